"""A gate on features, stored as its deviation from 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..libraries.functorch import applied


def gated(y: Tensor, d: Tensor) -> Tensor:
    """`y + y ∘ d`, for `y [.., n]` and `d [n]`, or `d [.., 1, n]`, in one dtype.

    The sum is made before it is rounded: in bfloat16, 1 + d would lose a small d. Backward makes
    the gradient of y in one kernel, where autograd would add up two tensors of its size.
    """
    if torch.compiler.is_compiling():  # which traces no jvp, and fuses the sum itself
        return torch.addcmul(y, y, d)
    return applied(Gated, y, d)


class Gated(torch.autograd.Function):
    """`gated` for autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y, d):  # pyright: ignore
        return torch.addcmul(y, y, d)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore
        y, d = ctx.saved_tensors
        dd = (grad * y).sum_to_size(d.shape) if ctx.needs_input_grad[1] else None
        return torch.addcmul(grad, grad, d), dd

    @staticmethod
    def jvp(ctx: Any, dy, dd):  # pyright: ignore
        y, d = ctx.saved_tensors
        return torch.addcmul(dy, dy, d) + y * dd
