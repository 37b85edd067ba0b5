"""Sparse matrices whose positions are fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..libraries.functorch import applied


def distinct(n: int, total: int, generator: torch.Generator | None) -> Tensor:
    """n different integers below `total`, ascending; every set of n is equally likely.

    `torch.randperm(total)[:n]` would do, but it draws `total` numbers, as many as the weight has:
    16 times slower for r = 32 on a layer of 4096 x 4096.
    """
    device = "cpu" if generator is None else generator.device
    found = torch.empty(0, dtype=torch.long, device=device)
    while len(found) < n:
        more = torch.randint(total, (n,), generator=generator, device=device)
        found = torch.cat([found, more]).unique()
    kept = torch.randperm(len(found), generator=generator, device=device)[:n]
    return found[kept].sort().values


def largest(M: Tensor, n: int) -> Tensor:
    """The positions of the n entries of M that are largest by magnitude, ascending."""
    return M.abs().flatten().topk(n).indices.sort().values


def scattered(v: Tensor, rows: Tensor, cols: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A dense matrix S of `shape` with `S[rows, cols] = v`, and zero elsewhere; each `[n]`."""
    return v.new_zeros(shape).index_put((rows, cols), v)


def entries(M: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """`M[rows, cols]`, the adjoint of `scattered`."""
    return M[rows, cols]


def sparse_product(
    x: Tensor,
    v: Tensor,
    rows: Tensor,
    cols: Tensor,
    shape: tuple[int, ...],
    *,
    make: Callable[..., Tensor] = scattered,
    adjoint: Callable[..., Tensor] = entries,
) -> Tensor:
    """`x Mᵀ` for M = `make(v, rows, cols, shape)` and `x [.., d_in]`.

    `make` is linear in v, with the `adjoint(M, rows, cols)`. Keeps its arguments for backward, and
    makes M anew there.
    """
    if torch.compiler.is_compiling():  # which traces no jvp, and itself chooses what to keep
        return F.linear(x, make(v, rows, cols, shape).to(x.dtype))
    # d_out alone: under nested transforms torch takes a tuple of numbers apart.
    return applied(SparseProduct, x, v, rows, cols, shape[0], make, adjoint)


class SparseProduct(torch.autograd.Function):
    """`sparse_product` for autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, v, rows, cols, d_out, make, adjoint):  # pyright: ignore  # noqa: PLR0917
        return F.linear(x, make(v, rows, cols, (d_out, x.shape[-1])).to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        *tensors, d_out, ctx.make, ctx.adjoint = inputs
        ctx.shape = d_out, tensors[0].shape[-1]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore
        x, v, *at = ctx.saved_tensors
        dx = grad @ ctx.make(v, *at, ctx.shape).to(x.dtype)
        dM = grad.reshape(-1, grad.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        return dx, ctx.adjoint(dM.to(v.dtype), *at), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx, dv, *_):  # pyright: ignore
        x, v, *at = ctx.saved_tensors
        M, dM = (ctx.make(t, *at, ctx.shape).to(x.dtype) for t in (v, dv))
        return F.linear(dx, M) + F.linear(x, dM)
