"""The product with a frozen matrix that is made anew each time: for packed weights, under every transform of torch.func.

bitsandbytes' own functions have no rules for torch.func: `grad` raises, and `jvp` returns 0 without a word. And a dequantized
matrix in an ordinary product would be kept for backward, which costs the memory that packing saves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore  (compiled)
from torch.autograd import forward_ad

from .variant import Weight


def frozen_product(x: Tensor, weight: Weight, transpose: bool = False) -> Tensor:
    """`x Wᵀ`, or `x W` with `transpose`, where `weight.dense()` is W `[d_out, d_in]`, in the dtype of x.

    Keeps nothing for backward but `weight`. Linear in x, so its derivatives are products of the same kind, of any order.
    """
    # dynamo traces no function with a jvp of its own; compiled code has grad and vmap, and says so of jvp
    product = Product if torch.compiler.is_compiling() else ProductWithJvp
    return product.apply(x, weight, transpose)


class Product(torch.autograd.Function):
    """What `frozen_product` is for autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Weight, transpose: bool) -> Tensor:  # pyright: ignore
        W = weight.dense().to(x.dtype)
        return x @ W if transpose else F.linear(x, W)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.weight, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return frozen_product(grad, ctx.weight, not ctx.transpose), None, None


class ProductWithJvp(Product):
    """The same, with forward mode."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # pyright: ignore
        return frozen_product(tangent, ctx.weight, ctx.transpose)


def in_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ..) is active in this thread, or forward-mode autograd in any."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0
