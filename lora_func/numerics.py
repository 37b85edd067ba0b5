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
from .variant import Params, Variant, Weight

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


def anchored(A0: Tensor, B0: Tensor) -> Params:
    """Trainable A and B that start at the frozen anchors A0 and B0."""
    return Params({"A": A0.clone(), "B": B0.clone()}, frozen={"A0": A0, "B0": B0})


def anchored_update(base: Tensor, x: Tensor, params: dict[str, Tensor], scale: float) -> Tensor:
    """`base + scale x (BA - B0A0)ᵀ`, telescoped: `base` to the bit where A and B are at their anchors."""
    A, B = low_rank_difference(params["A"], params["B"], params["A0"], params["B0"])
    return low_rank_update(base, x, A, B, scale)


def anchored_weight(weight: Weight, params: dict[str, Tensor], scale: float) -> Tensor:
    """`W + scale (BA - B0A0)`."""
    A, B = low_rank_difference(params["A"], params["B"], params["A0"], params["B0"])
    return at_least_float32(weight.dense()) + scale * B @ A


def check_fits(owner: str, r: int, shape: tuple[int, int]) -> None:
    """Raises LoraFuncError where r exceeds min(d_out, d_in)."""
    if r > min(shape):
        raise LoraFuncError(f"{owner}(r={r}) on a layer of shape {shape}: r must be at most {min(shape)} there")


def top_svd(
    weight: Weight, r: int, owner: str, niter: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`U_r [d_out, r]`, `S_r [r]`, `V_r [r, d_in]` of the dense weight, in float32 (float64 for a float64 weight).

    Exact, or with `niter` randomized, by so many power iterations from `generator`. Raises LoraFuncError where r exceeds
    min(d_out, d_in).
    """
    check_fits(owner, r, weight.shape)
    W = at_least_float32(weight.dense())
    if niter is not None:
        return randomized_svd(W, r, niter, generator)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r], S[:r], V[:r]


def randomized_svd(
    W: Tensor, r: int, niter: int, generator: torch.Generator | None, extra: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """The top r singular triplets of `W [m, n]`, nearly: Halko, Martinsson & Tropp 2011 (arXiv 0909.4061), algorithm 4.4.

    A random sketch of r + `extra` columns finds the range of W, `niter` power iterations sharpen it, with a QR after each.
    (`torch.svd_lowrank` does the same, but draws from torch's global generator.)
    """
    m, n = W.shape
    device = None if generator is None else generator.device
    sketch = torch.randn(n, min(r + extra, m, n), generator=generator, device=device).to(W)
    Q = torch.linalg.qr(W @ sketch).Q  # [m, r + extra]
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    U, S, V = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return (Q @ U)[:, :r], S[:r], V[:r]


def matrix_roots(C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(C + eps I)^(1/2)` and its inverse, of a symmetric positive semidefinite `C [d, d]`, by its eigenvalues."""
    values, Q = torch.linalg.eigh(C)
    root = (values.clamp(min=0) + eps).sqrt()
    return (Q * root) @ Q.mT, (Q / root) @ Q.mT


@full_precision
def skew(v: Tensor, n: int) -> Tensor:
    """The skew-symmetric matrices `[.., n, n]` whose upper triangles are `v [.., n (n - 1) / 2]`, row by row."""
    rows, cols = torch.triu_indices(n, n, 1, device=v.device)
    k = torch.arange(len(rows), device=v.device)
    basis = torch.zeros(len(rows), n, n, dtype=v.dtype, device=v.device)  # constant: a write into it does not meet vmap
    basis[k, rows, cols], basis[k, cols, rows] = 1, -1
    return torch.einsum("...t,tij->...ij", v, basis)


def coordinates(base_out: Tensor, bias: Tensor | None, U: Tensor) -> Tensor:
    """`(base_out - b) U [.., r]`: for left singular vectors `U [d_out, r]` of W it is `S * (V x)`, without S, V, x or W."""
    y = base_out if bias is None else base_out - bias.to(base_out.dtype)
    return y @ U.to(y.dtype)


def add_along(base_out: Tensor, z: Tensor, U: Tensor) -> Tensor:
    """`base_out + z Uᵀ` for `z [.., r]`."""
    return base_out + F.linear(z, U.to(z.dtype)).to(base_out.dtype)


def gain(g: Tensor, coeff: float, suppress_only: bool) -> Tensor:
    """`ELU(coeff g)`: how far the gains `1 + ELU(coeff g)`, which are positive, are from 1. `suppress_only` clamps g at 0."""
    return F.elu(coeff * (g.clamp(max=0) if suppress_only else g))


def cored(weight: Weight, U: Tensor, K: Tensor) -> Tensor:
    """`(I + U K Uᵀ) W` for a core `K [r, r]`."""
    W = at_least_float32(weight.dense())
    U = U.to(W.dtype)
    return W + U @ (K.to(W.dtype) @ (U.mT @ W))


def strongest(scores: Tensor | None, r: int) -> Tensor:
    """The indices of the r highest scores, in ascending order; of the first r without scores."""
    return torch.arange(r) if scores is None else scores.topk(r).indices.sort().values


def strongest_svd(weight: Weight, r: int, owner: str, scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`top_svd`; with `scores [min(d_out, d_in)]` of the r triplets that score highest, in descending order of S."""
    if scores is None:
        return top_svd(weight, r, owner)
    check_fits(owner, r, weight.shape)
    U, S, V = top_svd(weight, min(weight.shape), owner)
    kept = strongest(scores, r)
    return U[:, kept], S[kept], V[kept]


def needs_data(variant: Variant, what: str) -> LoraFuncError:
    """The error of an `init` without stats."""
    return LoraFuncError(
        f"{type(variant).__name__} starts from {what} of data: pass calibration=batches to adapt, or stats= to Adapter.init"
    )


def at_least_float32(t: Tensor) -> Tensor:
    """`t` in float32, or as it is where it is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
