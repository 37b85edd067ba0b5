"""A gate on features, stored as its deviation from 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..fused import can_repeat, repeated
from ..kernels import takes
from ..libraries.functorch import applied, in_transform
from ..linalg import at_least_float32


def gated(y: Tensor, d: Tensor) -> Tensor:
    """`y + y ∘ d`, for `y [.., n]` and `d [n]`, or `d [.., 1, n]`, in one dtype.

    The sum is made before it is rounded: in bfloat16, 1 + d would lose a small d. Backward makes
    the gradient of y in one kernel, where autograd would add up two tensors of its size.
    """
    if torch.compiler.is_compiling() or in_transform():  # a custom function takes 0.6 ms in these
        return torch.addcmul(y, y, d)
    return applied(Gated, y, d)


LARGE = 2**23  # entries from which a GPU takes longer for a gate than its CPU to ask for it


def gated_over(u: Tensor, d: Tensor) -> Tensor:
    """`gated` of an output of `fused.low_rank_linear`, written over it if it is large.

    Backward needs u for the gradient of d. It divides the output by 1 + d, and the output is often
    what the layer behind keeps anyway: so nothing of that size is kept twice. (For 1 + d = 0 that
    would lose u, so the factor is `ALMOST_ZERO` then.)
    """
    narrow = u.dtype == torch.float16  # whose smallest numbers a small factor would lose
    if u.numel() < LARGE or narrow or not can_repeat(u):
        return gated(u, d)
    return applied(GatedOver, u, d)


ALMOST_ZERO = 2.0**-60


def factor(d: Tensor) -> Tensor:
    """1 + d in float32 or wider, but not zero."""
    f = 1 + at_least_float32(d)
    return f + ALMOST_ZERO * (f == 0)  # the derivative is 1, there too


def stretched(t: Tensor, d: Tensor) -> Tensor:
    """`t` times `factor(d)`."""
    if torch.is_grad_enabled():
        return (t * factor(d)).to(t.dtype)
    if is_large(t, d):
        from ..kernels import programs  # noqa: PLC0415  (which imports Triton)

        return programs.gate(t, d, zero=ALMOST_ZERO)
    return t.clone().mul_(factor(d))


class GatedOver(torch.autograd.Function):
    """`gated_over` for autograd."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, d: Tensor):  # pyright: ignore
        ctx.mark_dirty(u)
        if is_large(u, d):
            from ..kernels import programs  # noqa: PLC0415  (which imports Triton)

            programs.gate(u, d, out=u, zero=ALMOST_ZERO)
        else:
            u.mul_(factor(d))
        ctx.save_for_backward(u)
        ctx.d = d  # apart, for when the model has written over the output
        return u

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore
        d = ctx.d
        if not ctx.needs_input_grad[1]:
            return stretched(grad, d), None
        try:
            (y,), by = ctx.saved_tensors, factor(d)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            y, by = repeated(ctx.next_functions[0][0]), 1  # u itself
        if is_large(grad, y, d):
            from ..kernels import programs  # noqa: PLC0415  (which imports Triton)

            gu, gd = programs.gate_backward(grad, y, d, ALMOST_ZERO)
        else:
            gu = stretched(grad, d)
            gd = (grad * y).sum_to_size(d.shape)
        return gu, (gd / by).to(d.dtype)


def is_large(*tensors: Tensor) -> bool:
    """Whether our own kernel, which autograd cannot pass, is faster for a gate.

    The last of the tensors is the gate `d [n]`, or `[k, 1, n]` of k examples `[k, rows, n]`.
    """
    y, d = tensors[0], tensors[-1]
    fits = d.dim() == 1 or (y.dim() == 3 and d.shape == (y.shape[0], 1, y.shape[-1]))
    large = y.numel() >= LARGE and fits
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

            gy, gd = programs.gate_backward(grad, y, d)
            return gy, gd.to(d.dtype)
        return torch.addcmul(grad, grad, d), (grad * y).sum_to_size(d.shape)
