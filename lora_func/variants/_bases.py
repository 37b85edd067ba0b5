"""A product with random bases of which one is scaled, and made anew where it is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..libraries.functorch import applied


def scaled(lam: Tensor, gam: Tensor, A: Tensor) -> Tensor:
    """`S [r n, d]` with rows `lam[i, j] A[i] gam[j]`, from lam [r, n], gam [n, d], A [r, 1, d]."""
    return (lam[:, :, None] * A * gam).flatten(0, 1)


def bases_product(
    x: Tensor, lam: Tensor, gam: Tensor, A: Tensor, B: Tensor, *, widens: bool
) -> Tensor:
    """`x Sᵀ Bᵀ` if the layer widens, and otherwise `x B S`, for `B [D, r n]`.

    S and B are cast to the dtype of x. Keeps its arguments for backward, and makes the rest anew.
    """
    if torch.compiler.is_compiling():  # which traces no jvp, and itself chooses what to keep
        return BasesProduct.forward(x, lam, gam, A, B, widens)
    return applied(BasesProduct, x, lam, gam, A, B, widens)


class BasesProduct(torch.autograd.Function):
    """`bases_product` for autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, lam, gam, A, B, widens):  # pyright: ignore  # noqa: PLR0917
        S, B = scaled(lam, gam, A).to(x.dtype), B.to(x.dtype)
        return (x @ S.mT) @ B.mT if widens else (x @ B) @ S

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        *tensors, ctx.widens = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore
        x, lam, gam, A, B = ctx.saved_tensors
        S, B = scaled(lam, gam, A).to(x.dtype), B.to(x.dtype)
        h, dh = (x, grad @ B) if ctx.widens else (x @ B, grad)  # on both sides of S
        dx = dh @ S if ctx.widens else (grad @ S.mT) @ B.mT
        into, out = (h, dh) if ctx.widens else (dh, h)  # [.., d], [.., r n]
        dS = out.reshape(-1, out.shape[-1]).mT @ into.reshape(-1, into.shape[-1])
        dS = dS.to(lam.dtype).unflatten(0, lam.shape) * A  # [r, n, d]
        return dx, (dS * gam).sum(-1), (dS * lam[:, :, None]).sum(0), None, None, None

    @staticmethod
    def jvp(ctx: Any, dx, dlam, dgam, *_):  # pyright: ignore
        x, lam, gam, A, B = ctx.saved_tensors
        both = [scaled(lam, gam, A), scaled(dlam, gam, A) + scaled(lam, dgam, A)]
        (S, dS), B = (t.to(x.dtype) for t in both), B.to(x.dtype)
        if ctx.widens:
            return (dx @ S.mT + x @ dS.mT) @ B.mT
        return (dx @ B) @ S + (x @ B) @ dS
