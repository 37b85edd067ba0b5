"""A gate on features, stored as its deviation from 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import takes
from ..libraries.functorch import applied, in_transform


def gated(y: Tensor, d: Tensor) -> Tensor:
    """`y + y ∘ d`, for `y [.., n]` and `d [n]`, or `d [.., 1, n]`, in one dtype.

    The sum is made before it is rounded: in bfloat16, 1 + d would lose a small d. Backward makes
    the gradient of y in one kernel, where autograd would add up two tensors of its size.
    """
    if torch.compiler.is_compiling() or in_transform():  # a custom function takes 0.6 ms in these
        return torch.addcmul(y, y, d)
    return applied(Gated, y, d)


LARGE = 2**23  # entries from which a GPU takes longer for a gate than its CPU to ask for it


def is_large(*tensors: Tensor) -> bool:
    """Whether our own kernel, which autograd cannot pass, is faster for a gate `d [n]`.

    It is the last of the tensors.
    """
    large = tensors[0].numel() >= LARGE and tensors[-1].dim() == 1
    return large and not torch.is_grad_enabled() and takes(*tensors)


def gate(y: Tensor, d: Tensor) -> Tensor:
    """`y + y ∘ d`, by whichever kernel is faster."""
    if is_large(y, d):
        from ..kernels import programs  # noqa: PLC0415  (which imports Triton)

        return programs.gate(y, d)
    return torch.addcmul(y, y, d)


class Gated(torch.autograd.Function):
    """`gated` for autograd."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, d: Tensor):  # pyright: ignore
        ctx.save_for_backward(y, d)
        return gate(y, d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore
        y, d = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return gate(grad, d), None
        if is_large(grad, y, d):
            from ..kernels import programs  # noqa: PLC0415  (which imports Triton)

            return programs.gate_backward(grad, y, d)
        return torch.addcmul(grad, grad, d), (grad * y).sum_to_size(d.shape)
