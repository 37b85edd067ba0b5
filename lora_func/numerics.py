"""The numerical pieces that several variants share. Each is pure, works under torch.func, and has its own edge tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import LoraFuncError
from .variant import Weight

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` with autocast off, so that a user's autocast does not round its norms, Gram matrices and solves."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator | None) -> Tensor:
    """U(-bound, bound) in float32, drawn on the device of the generator."""
    device = None if generator is None else generator.device
    return (torch.rand(shape, generator=generator, device=device, dtype=torch.float32) * 2 - 1) * bound


def kaiming(rows: int, cols: int, generator: torch.Generator | None) -> Tensor:
    """`[rows, cols]` of U(-1/sqrt(cols), 1/sqrt(cols)): He et al. 2015 (arXiv 1502.01852), a = sqrt(5), as in PEFT."""
    return uniform((rows, cols), cols**-0.5, generator)


def low_rank_update(base: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """`base + scale (x Aᵀ) Bᵀ` for `base [.., o]`, `x [.., i]`, `A [r, i]`, `B [o, r]`, in the shape and dtype of `base`.

    A and B are cast to the dtype of the compute, x is not; BA is never formed. Kept for backward: x and the [.., r]
    intermediate. The scale rides on the sum, which costs no kernel of its own in the forward. (`addmm` would fuse the sum
    into the product, but it copies `base` first, and in eager mode its two reshapes cost more than the kernel that it saves.)
    """
    h = F.linear(x, A.to(x.dtype))  # [.., r]
    delta = F.linear(h, B.to(h.dtype))  # [.., o]
    return torch.add(base, delta.to(base.dtype), alpha=scale)


def low_rank_difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """`(A', B')` of rank 2r with `B'A' = BA - B0A0`, such that B'A' is literally zero where A = A0 and B = B0.

    BA - B0A0 = (B - B0) A + B0 (A - A0): each term has a factor that is zero to the bit, whatever the order of summation.
    The anchors are rounded to the dtype of the parameters first, so that this also holds for parameters kept in bfloat16.
    """
    A0, B0 = A0.to(A.dtype), B0.to(B.dtype)
    return torch.cat([A, A - A0], dim=-2), torch.cat([B - B0, B0], dim=-1)  # [2r, i], [o, 2r]


@full_precision
def compact_wy(U: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The product of Householder reflections `R = H_0 H_1 .. H_{r-1}`, `H_j = I - 2 u_j u_jᵀ / |u_j|²`, as a low-rank update.

    `U [r, d]` holds the vectors as rows, of any length (clamped at `eps`, so that a zero row reflects nothing and has no NaN
    gradient). Returns `(V, K)`, each `[r, d]` and at least float32, with `x Rᵀ = x - (x Vᵀ) K`.

    Compact WY form (Joffrain et al. 2006, doi 10.1145/1141885.1141886): R = I - Ûᵀ T Û with T⁻¹ = I/2 + striu(Û Ûᵀ). For
    V = sqrt(2) Û that is R = I - Vᵀ (I + striu(V Vᵀ))⁻¹ V, so K = (I + stril(V Vᵀ))⁻¹ V is one solve, which reads of V Vᵀ
    nothing but what lies below the diagonal.
    """
    V = at_least_float32(U)
    V = V * (math.sqrt(2) / V.norm(dim=-1, keepdim=True).clamp(min=eps))
    return V, torch.linalg.solve_triangular(V @ V.mT, V, upper=False, unitriangular=True)


def top_svd(weight: Weight, r: int, owner: str) -> tuple[Tensor, Tensor, Tensor]:
    """`U_r [d_out, r]`, `S_r [r]`, `V_r [r, d_in]` of the dense weight: exact, in float32 (float64 for a float64 weight).

    Raises LoraFuncError where r exceeds min(d_out, d_in).
    """
    if r > min(weight.shape):
        raise LoraFuncError(f"{owner}(r={r}) on a layer of shape {weight.shape}: r must be at most {min(weight.shape)} there")
    U, S, V = torch.linalg.svd(at_least_float32(weight.dense()), full_matrices=False)
    return U[:, :r], S[:r], V[:r]


def at_least_float32(t: Tensor) -> Tensor:
    """`t` in float32, or as it is where it is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
