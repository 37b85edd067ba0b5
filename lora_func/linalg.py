"""Linear algebra that variants share: tensors in, tensors out.

Every function is pure and works under torch.func. `low_rank_*`, `compact_wy`, `cayley_*` and
`skew` are for `apply` and `prepare`; the decompositions are for `init`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32, full_precision

__all__ = [
    "at_least_float32",
    "cayley_minus_identity",
    "compact_wy",
    "full_precision",
    "kaiming",
    "low_rank_difference",
    "low_rank_update",
    "matrix_root",
    "normal",
    "over_rows",
    "randomized_svd",
    "skew",
    "svd_by_eigenvectors",
    "top_svd",
    "uniform",
    "weighted_sum",
]


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator | None) -> Tensor:
    """`shape` of U(-bound, bound) in float32, drawn on the device of the generator."""
    device = None if generator is None else generator.device
    draw = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
    return (draw * 2 - 1) * bound


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator | None) -> Tensor:
    """`shape` of N(0, std²) in float32, drawn on the device of the generator."""
    device = None if generator is None else generator.device
    return std * torch.randn(shape, generator=generator, device=device, dtype=torch.float32)


def kaiming(rows: int, cols: int, generator: torch.Generator | None) -> Tensor:
    """`[rows, cols]` of U(-1/sqrt(cols), 1/sqrt(cols)), as PEFT draws A.

    He et al. 2015 (arXiv 1502.01852) with a = sqrt(5).
    """
    return uniform((rows, cols), cols**-0.5, generator)


def low_rank_update(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """`base + scale (x Aᵀ) Bᵀ + bias`, in the shape and dtype of `base`.

    `base [.., o]`, `x [.., i]`, `A [r, i]`, `B [o, r]`, `bias [o]`. All but x are cast; BA is never
    formed. Kept for backward: x and the `[.., r]` intermediate, which is what the scale applies to.
    (`addmm` would fuse the sum with the product, but it copies `base`.)

    Examples may have factors of their own: then A, B or bias have an axis n in front, x is
    `[n, rows, i]` and base `[n, rows, o]`.
    """
    if A.dim() == 3 or B.dim() == 3 or (bias is not None and bias.dim() == 2):
        return low_rank_updates(base, x, A, B, scale, bias)
    h = times(scale, F.linear(x, cast(A, x.dtype)))  # [.., r]
    b = None if bias is None else cast(bias, h.dtype)
    return base + cast(F.linear(h, cast(B, h.dtype), b), base.dtype)  # [.., o]


def low_rank_updates(  # noqa: PLR0917  (as above)
    base: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    """`low_rank_update` of n examples, `x [n, rows, i]`, some of whose factors have an axis n."""
    h = times(scale, x @ cast(A, x.dtype).mT)  # [n, rows, r]
    if bias is not None:
        base = base + over_rows(bias).to(base.dtype)
    B = cast(B, h.dtype)
    if B.dim() == 3 and base.dtype == h.dtype:
        return torch.baddbmm(base, h, B.mT)  # [n, rows, o]
    return base + (h @ B.mT).to(base.dtype)


def times(s: float, t: Tensor) -> Tensor:
    """`s t`, without a kernel for s = 1."""
    return t if s == 1 else s * t


def over_rows(v: Tensor) -> Tensor:
    """`v [d]`, or `[n, d]` of n examples, in a shape that goes with `[n, rows, d]`."""
    return v if v.dim() == 1 else v[:, None]


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`. To find that there is nothing to do takes `to` 0.7 us, and this 0.1."""
    return t if t.dtype == dtype else t.to(dtype)


def weighted_sum(C: Tensor, B: Tensor, A: Tensor, beta: float, alpha: float) -> Tensor:
    """`beta C + alpha B A`, of matrices. In compiled code not by `addmm`, which loses both factors
    where inductor takes it apart (pytorch/pytorch#167313, and the same for `torch.add`)."""
    if torch.compiler.is_compiling():
        return beta * C + alpha * (B @ A)
    return torch.addmm(C, B, A, beta=beta, alpha=alpha)


def low_rank_difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """`(A', B')` of rank 2r with `B'A' = BA - B0A0`, where B'A' is exactly zero for A = A0, B = B0.

    BA - B0A0 = (B - B0) A + B0 (A - A0): each term has a factor that is zero to the bit, in
    whatever order the products are summed. The anchors are rounded to the dtype of A and B first,
    so this also holds for parameters in bfloat16.
    """
    A0, B0 = A0.to(A.dtype), B0.to(B.dtype)
    return torch.cat([A, A - A0], dim=-2), torch.cat([B - B0, B0], dim=-1)  # [2r, i], [o, 2r]


@full_precision
def compact_wy(U: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """A product of Householder reflections as a low-rank update.

    `R = H_0 H_1 .. H_{r-1}` with `H_j = I - 2 u_j u_jᵀ / |u_j|²` for the rows u_j of `U [r, d]`.
    Their lengths are clamped at `eps`: a zero row reflects nothing and has no NaN gradient.
    Returns `(V, K)`, each `[r, d]`, in float32 or wider, such that `x Rᵀ = x - (x Vᵀ) K`.

    Compact WY form (Joffrain et al. 2006, doi 10.1145/1141885.1141886): R = I - Ûᵀ T Û with
    T⁻¹ = I/2 + striu(Û Ûᵀ). With V = sqrt(2) Û, R = I - Vᵀ (I + striu(V Vᵀ))⁻¹ V. So
    K = (I + stril(V Vᵀ))⁻¹ V is one triangular solve, which reads V Vᵀ below the diagonal only.
    """
    V = at_least_float32(U)
    V = V * (math.sqrt(2) / V.norm(dim=-1, keepdim=True).clamp(min=eps))
    return V, torch.linalg.solve_triangular(V @ V.mT, V, upper=False, unitriangular=True)


def skew(v: Tensor, n: int) -> Tensor:
    """Skew-symmetric `[.., n, n]` with the upper triangles `v [.., n (n - 1) / 2]`, row by row."""
    rows, cols = torch.triu_indices(n, n, 1, device=v.device)
    # Written, and not read by index: the gradient of a read sums up whatever was read twice.
    upper = v.new_zeros(*v.shape[:-1], n * n).index_copy(-1, rows * n + cols, v)
    upper = upper.unflatten(-1, (n, n))
    return upper - upper.mT


@full_precision
def cayley_minus_identity(X: Tensor) -> Tensor:
    """`(I - X)⁻¹ (I + X) - I = (I - X)⁻¹ 2X` for skew-symmetric `X [.., n, n]`.

    `I` plus it is orthogonal; `-X` gives the inverse. Exactly zero for X = 0. In float32 or wider.
    """
    X = at_least_float32(X)
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    # `solve` would wait for the GPU, to see whether I - X is singular. It never is.
    return torch.linalg.solve_ex(eye - X, 2 * X).result


@full_precision
def top_svd(
    W: Tensor, r: int, niter: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`U_r [.., m, r]`, `S_r [.., r]`, `V_r [.., r, n]` of `W [.., m, n]`, for r up to min(m, n).

    In float32, or float64 for a float64 W. With `niter` randomized, see `randomized_svd`. Exact
    otherwise: on a CPU by LAPACK, with the signs of PEFT's inits, and on a GPU by
    `svd_by_eigenvectors`.
    """
    W = at_least_float32(W)
    if niter is not None:
        return randomized_svd(W, r, niter, generator)
    if W.is_cuda:
        return svd_by_eigenvectors(W, r)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return U[..., :r], S[..., :r], V[..., :r, :]


def svd_by_eigenvectors(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The top r singular triplets of `W [.., m, n]`, by those of WᵀW or WWᵀ in float64.

    The squares lose half of the digits, and float64 has twice those of float32: for a W in float32,
    values and orthogonality are exact to 6e-8, whatever the spectrum. For 4096 x 4096 on an H200
    that takes 0.12 s; `torch.linalg.svd` takes 1 to 4 s there, and errs by 1e-3
    (bench/results/init-h200.json).
    """
    tall = W.shape[-2] >= W.shape[-1]
    M = (W if tall else W.mT).double()
    Q = torch.linalg.eigh(M.mT @ M).eigenvectors.flip(-1)[..., :r]  # the largest first
    P, R = torch.linalg.qr(M @ Q)  # orthogonal also where a singular value is zero
    S = R.diagonal(dim1=-2, dim2=-1)
    P = P * torch.where(S < 0, -1.0, 1.0)[..., None, :]
    U, V = (P, Q.mT) if tall else (Q, P.mT)
    return U.to(W), S.abs().to(W), V.to(W)


def randomized_svd(
    W: Tensor, r: int, niter: int, generator: torch.Generator | None, extra: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Approximately the top r singular triplets of `W [m, n]`.

    Halko, Martinsson & Tropp 2011 (arXiv 0909.4061), algorithm 4.4: a random sketch of r + `extra`
    columns finds the range of W; `niter` power iterations sharpen it, with a QR after each.
    (`torch.svd_lowrank` does the same, but draws from torch's global generator.)
    """
    m, n = W.shape
    device = None if generator is None else generator.device
    sketch = torch.randn(n, min(r + extra, m, n), generator=generator, device=device).to(W)
    Q = torch.linalg.qr(W @ sketch).Q  # [m, r + extra]
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    U, S, V = top_svd(Q.mT @ W, r)
    return Q @ U, S, V


@full_precision
def matrix_root(C: Tensor, eps: float) -> Tensor:
    """`(C + eps I)^(1/2)` of a symmetric positive semidefinite `C [d, d]`, by eigenvalues."""
    values, Q = torch.linalg.eigh(C)
    return (Q * (values.clamp(min=0) + eps).sqrt()) @ Q.mT
