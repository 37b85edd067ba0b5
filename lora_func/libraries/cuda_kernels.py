"""CUDA's fused kernels on the device "meta": what they return and keep, which is all that exists.

PyTorch takes these kernels on CUDA alone. Elsewhere attention and RMSNorm fall apart into small
operations, which keep more for backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

RELIES_ON = {
    "torch": ("ops.aten._scaled_dot_product_flash_attention", "ops.aten._local_scalar_dense"),
}


class AsOnCUDA(TorchFunctionMode):
    """Within it, tensors on "meta" pass the kernels that they would pass on CUDA.

    A mask of attention is not read. The kernels that take one keep the same tensors.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return attention(*args[:3], **kwargs)
        if func is F.rms_norm and args[0].is_meta:
            return RMSNorm.apply(args[0], kwargs.get("weight"))
        return func(*args, **kwargs)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, **others: Any
) -> Tensor:
    """The output of flash attention, of which backward keeps q, k, v, it and a number a row."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, 0.0, is_causal)[0]


class RMSNorm(torch.autograd.Function):
    """The fused RMSNorm, which keeps its input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        """The output has the shape of x."""
        row = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(x, weight, row)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients have the shapes of x and of the weight."""
        x, weight, _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        return torch.empty_like(x), torch.empty_like(weight) if wanted else None


def asks_about_data(func: Any, args: Any) -> bool:
    """Whether `func` is the reading of a truth value from a tensor on "meta", which has none."""
    reads = func is torch.ops.aten._local_scalar_dense.default
    return reads and args[0].is_meta and args[0].dtype == torch.bool
