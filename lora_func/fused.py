"""A linear layer and its low-rank update as one function of autograd.

Apart, the base layer and its update make two tensors of the size of the output, and two of the size
of the input in backward, only to add each pair up. Together, the update is added to what the base
layer has made. That is exact: a product that adds to its output rounds once, where two round twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .linalg import cast


def low_rank_linear(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float = 1.0
) -> Tensor:
    """`x Wᵀ + b + scale (x Aᵀ) Bᵀ`, with frozen W and b.

    `x [.., i]`, `W [o, i]`, `b [o]`, `A [r, i]`, `B [o, r]`; A and B are cast to the dtype of x,
    which is that of W. Examples may have factors of their own, with an axis n in front; then x is
    `[n, rows, i]`. Kept for backward: x and the `[.., r]` intermediate.

    For eager autograd of any order, not for torch.func. `linalg.low_rank_update` is its oracle.
    """
    A, B = cast(A, x.dtype), cast(B, x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
        return LowRankLinear.apply(x, W, b, A, B, scale)
    return forward(x, W, b, A, B, scale)[0]


def forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and `h = x Aᵀ`."""
    y = F.linear(x, W, b).contiguous()  # it is, unless x has a layout of its own
    h = rows(x, A, B) @ A.mT
    add_product(rows(y, A, B), h, B.mT, scale)
    return y, h


class LowRankLinear(torch.autograd.Function):
    """`low_rank_linear` for autograd."""

    @staticmethod
    def forward(ctx: Any, x, W, b, A, B, scale):  # pyright: ignore
        y, h = forward(x, W, b, A, B, scale)
        ctx.save_for_backward(x, W, A, B, h)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore
        x, W, A, B, h = ctx.saved_tensors
        needs_x, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        again = torch.is_grad_enabled()  # with create_graph: all that follows is differentiated
        g, X = rows(grad, A, B), rows(x, A, B)
        if again:
            h = X @ A.mT
        gh = g @ B  # [.., r]
        if ctx.scale != 1:
            gh, h = ctx.scale * gh, ctx.scale * h
        gx = None
        if needs_x:
            gx = grad.matmul(W).contiguous()
            if again:
                gx = gx + (gh @ A).view_as(gx)
            else:
                add_product(rows(gx, A, B), gh, A)
        gA = over(gh, X, A) if needs_A else None
        gB = over(g, h, B) if needs_B else None
        return gx, None, None, gA, gB, None


def rows(t: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """`t [.., d]` as a matrix, or as it is if examples have factors of their own."""
    return t if A.dim() == 3 or B.dim() == 3 else t.reshape(-1, t.shape[-1])


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Adds `scale left @ right` to `out`, a matrix or a stack of them."""
    if out.dim() == 2:
        out.addmm_(left, right, alpha=scale)
    else:
        out.baddbmm_(left, right.expand(len(out), *right.shape[-2:]), alpha=scale)


def over(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """`leftᵀ right`, summed over the rows that share the factor `like`."""
    if like.dim() == 2 and left.dim() == 3:
        left, right = (t.reshape(-1, t.shape[-1]) for t in (left, right))
    return left.transpose(-1, -2) @ right
