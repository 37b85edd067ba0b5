"""A linear layer and its low-rank update as one function of autograd.

Apart, the base layer and its update make two tensors of the size of the output, and two of the size
of the input in backward, only to add each pair up. Together, the update is added to what the base
layer has made. That is exact: a product that adds to its output rounds once, where two round twice.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import takes
from .libraries.functorch import applied, own_tensor, packs_saved
from .linalg import cast, low_rank_update

FEW = 16
"""Rows of an input that are few: each of them reads all of A again."""


class Packed(Protocol):
    """A matrix that a layer holds packed, and b with it."""

    def layer_output(self, x: Tensor) -> Tensor:
        """`x Wᵀ + b`, as the layer computes it."""
        ...

    def dense(self) -> Tensor:
        """W `[o, i]`, made anew."""
        ...


def low_rank_linear(  # noqa: PLR0917  (the names of the formula)
    x: Tensor, W: Tensor | Packed, b: Tensor | None, A: Tensor, B: Tensor, scale: float = 1.0
) -> Tensor:
    """`x Wᵀ + b + scale (x Aᵀ) Bᵀ`, with frozen W and b.

    `x [.., i]`, `W [o, i]`, `b [o]`, `A [r, i]`, `B [o, r]`; A and B are cast to the dtype of x,
    which is that of W. Examples may have factors of their own, with an axis n in front; then x is
    `[n, rows, i]`. Kept for backward: x if A requires grad, the `[.., r]` intermediate if B does. A
    packed W has its own b; backward unpacks it once more.

    For eager autograd of any order, not for torch.func. `linalg.low_rank_update` is its oracle, and
    is what runs if B alone requires grad: second derivatives then need not x.
    """
    A, B = cast(A, x.dtype), cast(B, x.dtype)
    needs_A, needs_B = A.requires_grad, B.requires_grad
    if not (torch.is_grad_enabled() and (needs_A or needs_B or x.requires_grad)):
        return inference(x, W, b, A, B, scale)
    if needs_B and not needs_A:
        return low_rank_update(base_output(x, W, b), x, A, B, scale)
    own = A.dim() == 3 or B.dim() == 3
    if packs_saved():
        return applied(Outer, applied(Inner, x, W, A, B, own), x, W, b, B, scale, own)
    return applied(LowRankLinear, x, W, b, A, B, scale, own)


# Each adapted layer of each step passes here. On a fast GPU a step may wait for Python, so what
# follows has few small functions. `own`: examples have factors of their own, and x is a stack.


def base_output(x: Tensor, W: Tensor | Packed, b: Tensor | None) -> Tensor:
    """`x Wᵀ + b`, contiguous."""
    y = F.linear(x, W, b) if isinstance(W, Tensor) else W.layer_output(x)
    return y.contiguous()  # it is, unless x has a layout of its own


def inner(x: Tensor, A: Tensor, own: bool) -> Tensor:
    """`h = x Aᵀ`, a matrix `[rows, r]` or a stack of them."""
    return x @ A.mT if own else F.linear(rows(x, own), A)


def add_outer(y: Tensor, h: Tensor, B: Tensor, scale: float, own: bool) -> None:
    """`y += scale h Bᵀ`, in place."""
    if own:
        add_product(y, h, B.mT, scale)
    else:
        y.view(-1, y.shape[-1]).addmm_(h, B.t(), alpha=scale)


def inference(  # noqa: PLR0917  (as above)
    x: Tensor, W: Tensor | Packed, b: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """The output alone. One kernel updates a few rows, such as those of a decoded token."""
    y = base_output(x, W, b)
    if x.is_cuda and x.numel() <= FEW * x.shape[-1] and takes(x, A, B):
        from .kernels import programs  # noqa: PLC0415  (which imports Triton)

        programs.add_low_rank(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), A, B, scale)
    else:
        own = A.dim() == 3 or B.dim() == 3
        add_outer(y, inner(x, A, own), B, scale, own)
    return y


def keep(ctx: Any, *tensors: Any) -> None:
    """Keeps x, W, A, B and h for backward. A packed W is no tensor, so the node holds it."""
    x, W, A, B, h = tensors
    plain, ctx.packed = (W, None) if isinstance(W, Tensor) else (None, W)
    ctx.save_for_backward(x, plain, A, B, h)


class LowRankLinear(torch.autograd.Function):
    """`low_rank_linear` for autograd."""

    @staticmethod
    def forward(ctx: Any, x, W, b, A, B, scale, own):  # noqa: PLR0917  # pyright: ignore
        y = own_tensor(base_output(x, W, b))
        h = inner(x, A, own)
        add_outer(y, h, B, scale, own)
        _, _, _, needs_A, needs_B, _, _ = ctx.needs_input_grad
        keep(ctx, x if needs_A else None, W, A, B, h if needs_B else None)
        ctx.scale, ctx.own = scale, own
        ctx.repeats = needs_A and b is None
        return y

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore
        x, W, A, B, h = ctx.saved_tensors
        needs_x, _, _, needs_A, needs_B, _, _ = ctx.needs_input_grad
        own, scale = ctx.own, ctx.scale
        g = rows(grad, own)
        if needs_A:
            x = rows(x, own)
            if needs_B and torch.is_grad_enabled():  # all that follows is differentiated
                h = x @ A.mT
        gh = product(g, B, scale)  # [.., r]
        gx = plus_low_rank(through_base(grad, W, ctx.packed), gh, A, own) if needs_x else None
        gA = over(gh, x, A) if needs_A else None
        gB = over(g, h, B, scale) if needs_B else None
        return gx, None, None, gA, gB, None, None


class Inner(torch.autograd.Function):
    """`h = x Aᵀ`, for `Outer`. It keeps what both need for backward.

    So all is kept before the layer's own product is made. A checkpoint that computes a block once
    more stops when it has what was kept: it never makes that product if the layer is the last.
    """

    @staticmethod
    def forward(ctx: Any, x, W, A, B, own):  # noqa: PLR0917  # pyright: ignore
        h = inner(x, A, own)
        _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        keep(ctx, x if needs_A else None, W, A, B, h if needs_B else None)
        ctx.own = own
        return h

    @staticmethod
    def backward(ctx: Any, gh):  # pyright: ignore
        (gx, x, A), ctx.handed = ctx.handed, None
        gx = None if gx is None else plus_low_rank(gx, gh, A, ctx.own)
        gA = over(gh, x, A) if ctx.needs_input_grad[2] else None
        return gx, None, gA, None, None


class Outer(torch.autograd.Function):
    """`x Wᵀ + b + scale h Bᵀ`. It hands to the backward of `Inner` what that needs of its own.

    What a checkpoint keeps may be read only once, and the gradient of x is added to in place.
    """

    @staticmethod
    def forward(ctx: Any, h, x, W, b, B, scale, own):  # noqa: PLR0917  # pyright: ignore
        y = own_tensor(base_output(x, W, b))
        add_outer(y, h, B, scale, own)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore
        node = ctx.next_functions[0][0]  # of `Inner`
        x, W, A, B, h = node.saved_tensors
        own, needs_B = node.own, ctx.needs_input_grad[4]
        g = rows(grad, own)
        if x is not None:
            x = rows(x, own)
            if needs_B and torch.is_grad_enabled():
                h = x @ A.mT
        gh = product(g, B, ctx.scale)
        gx = through_base(grad, W, node.packed) if node.needs_input_grad[0] else None
        node.handed = gx, x, A
        gB = over(g, h, B, ctx.scale) if needs_B else None
        return gh, None, None, None, gB, None, None


def through_base(grad: Tensor, W: Tensor | None, packed: Packed | None) -> Tensor:
    """`grad W`, of the layer's own or packed matrix."""
    if packed is not None:
        with torch.no_grad():
            W = packed.dense().to(grad.dtype)
    return grad.matmul(W).contiguous()  # pyright: ignore  (one of the two is there)


def plus_low_rank(gx: Tensor, gh: Tensor, A: Tensor, own: bool) -> Tensor:
    """`gx + gh A`, in its place unless it is to be differentiated."""
    if torch.is_grad_enabled():
        return gx + (gh @ A).view_as(gx)
    if own:
        add_product(gx, gh, A, 1.0)
    else:
        gx.view(-1, gx.shape[-1]).addmm_(gh, A)
    return gx


def can_repeat(y: Tensor) -> bool:
    """Whether `repeated` can make `y`, an output of `low_rank_linear`, from what is kept anyway."""
    return getattr(y.grad_fn, "repeats", False)


def repeated(node: Any) -> Tensor:
    """The output of `low_rank_linear` once more, from its node in the graph of autograd."""
    x, W, A, B, _ = node.saved_tensors
    return low_rank_linear(x, node.packed if W is None else W, None, A, B, node.scale)


def rows(t: Tensor, own: bool) -> Tensor:
    """`t [.., d]` as a matrix, or as it is if examples have factors of their own."""
    return t if own else t.reshape(-1, t.shape[-1])


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float, keep: int = 1) -> Tensor:
    """`keep out + scale left @ right`, in the place of `out`, a matrix or a stack of them."""
    if out.dim() == 2:
        return out.addmm_(left, right, beta=keep, alpha=scale)
    return out.baddbmm_(left, right.expand(len(out), *right.shape[-2:]), beta=keep, alpha=scale)


def product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """`scale left @ right`. One kernel, unless it is to be differentiated."""
    if scale == 1 or torch.is_grad_enabled():
        out = left @ right
        return out if scale == 1 else scale * out
    out = left.new_empty(*left.shape[:-1], right.shape[-1])
    return add_product(out, left, right, scale, keep=0)


def over(left: Tensor, right: Tensor, like: Tensor, scale: float = 1.0) -> Tensor:
    """`scale leftᵀ right`, summed over the rows that share the factor `like`."""
    if like.dim() == 2 and left.dim() == 3:
        left, right = (t.reshape(-1, t.shape[-1]) for t in (left, right))
    return product(left.mT, right, scale)
