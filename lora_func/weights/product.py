"""The product with a frozen matrix that is made anew each time, under every torch.func transform.

For packed weights. bitsandbytes' own functions have no rules for torch.func: `grad` raises, and
`jvp` silently returns 0. And autograd would keep a dequantized matrix for backward, which costs
the memory that packing saves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..libraries.functorch import applied, in_functorch, through_transform
from ..variant import Weight


def frozen_product(x: Tensor, weight: Weight, transpose: bool = False) -> Tensor:
    """`x Wᵀ`, or `x W` with `transpose`, for W = `weight.dense()`, in the dtype of x.

    Keeps nothing for backward but `weight`. It is linear in x, so its derivatives, of any order,
    are products of the same kind.
    """
    # Dynamo traces no function with a jvp of its own. Compiled code has grad and vmap, and raises
    # on jvp.
    if torch.compiler.is_compiling():
        return Product.apply(x, weight, transpose)
    if in_functorch():
        return through_transform(
            lambda x: frozen_product(x, weight, transpose),
            lambda grad: frozen_product(grad, weight, not transpose),
            x,
        )
    if x.requires_grad and torch.is_grad_enabled():
        return applied(ProductWithJvp, x, weight, transpose)
    return product(x, weight, transpose)


def product(x: Tensor, weight: Weight, transpose: bool) -> Tensor:
    """`frozen_product` without a backward."""
    with torch.no_grad():  # W is frozen, whatever its layer says
        W = weight.dense().to(x.dtype)
        return x @ W if transpose else F.linear(x, W)


class Product(torch.autograd.Function):
    """`frozen_product` for autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Weight, transpose: bool) -> Tensor:  # pyright: ignore
        return product(x, weight, transpose)

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
