"""The linear algebra that variants share, at its edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_func import linalg

F64: dict[str, Any] = {"dtype": torch.float64}


def eye(n: int) -> Tensor:
    return torch.eye(n, **F64)


# low-rank products


def test_a_low_rank_difference_is_zero_at_its_anchors():
    """It is zero to the bit in every dtype, even for anchors that the dtype cannot hold."""
    A0, B0 = torch.randn(3, 5, **F64), torch.randn(4, 3, **F64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        A, B = linalg.low_rank_difference(A0.to(dtype), B0.to(dtype), A0, B0)
        assert torch.equal(B @ A, torch.zeros(4, 5, dtype=dtype))


def test_a_low_rank_update_of_nothing():
    """Without tokens, rank or features it has the shape of the base."""
    for tokens, r, i, o in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        base, x = torch.randn(tokens, o), torch.randn(tokens, i)
        out = linalg.low_rank_update(base, x, torch.randn(r, i), torch.randn(o, r), 2.0)
        assert out.shape == base.shape
        if 0 in (r, i):
            assert torch.equal(out, base)


# reflections


def dense_reflections(U: Tensor) -> Tensor:
    R = torch.eye(U.shape[1], dtype=U.dtype)
    for u in U:
        length = u.norm()
        if length > 0:
            R = R - 2 * R @ torch.outer(u, u) / length**2
    return R


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (6, 3), (2, 9)], ids=str)
def test_compact_wy_with_more_reflections_than_dimensions(shape):
    U = torch.randn(shape, **F64)
    V, K = linalg.compact_wy(U)
    torch.testing.assert_close(eye(shape[1]) - V.mT @ K, dense_reflections(U).mT)


def test_compact_wy_of_zero_rows():
    """A zero row reflects nothing, and its gradient is finite."""
    U = torch.randn(4, 5, **F64)
    U[1] = U[3] = 0
    V, K = linalg.compact_wy(U)
    torch.testing.assert_close(eye(5) - V.mT @ K, dense_reflections(U).mT)
    U.requires_grad_()
    V, K = linalg.compact_wy(U)
    (V.mT @ K).square().sum().backward()
    assert U.grad.isfinite().all()


@pytest.mark.parametrize("length", [1e-5, 1.0, 1e8, 1e15])
def test_compact_wy_sees_directions_alone(length):
    """In float32 this holds for any length between the clamp and the overflow of a square."""
    U = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    U = U / U.norm(dim=1, keepdim=True)
    expected, given = linalg.compact_wy(U), linalg.compact_wy(length * U)
    torch.testing.assert_close(given, expected)


def test_compact_wy_of_nearly_parallel_vectors():
    """R is orthogonal even for a singular U: the solved triangle has ones on its diagonal."""
    u = torch.randn(8, **F64)
    U = u + 1e-9 * torch.randn(6, 8, **F64)
    V, K = linalg.compact_wy(U)
    R = eye(8) - V.mT @ K
    torch.testing.assert_close(R @ R.mT, eye(8))
    torch.testing.assert_close(R.mT, dense_reflections(U), rtol=0, atol=1e-6)


# skew matrices and rotations


@pytest.mark.parametrize("n", [1, 2, 5])
def test_skew_of_any_size(n):
    v = torch.arange(1.0, 1 + n * (n - 1) / 2, **F64)
    K = linalg.skew(v, n)
    assert torch.equal(K, -K.mT)
    rows, cols = torch.triu_indices(n, n, 1)
    assert torch.equal(K[rows, cols], v)


def test_skew_of_a_batch_and_of_none():
    v = torch.randn(3, 0, 6, **F64)
    assert linalg.skew(v, 4).shape == (3, 0, 4, 4)
    v = torch.randn(2, 3, 6, **F64)
    assert torch.equal(linalg.skew(v, 4)[1, 2], linalg.skew(v[1, 2], 4))


@pytest.mark.parametrize("size", [0.0, 1e-12, 1.0, 1e3, 1e6])
def test_cayley_is_orthogonal_at_any_size(size):
    """The singular values of I - X are at least 1, so the solve is well conditioned."""
    X = linalg.skew(size * torch.randn(10, **F64), 5)
    R = eye(5) + linalg.cayley_minus_identity(X)
    torch.testing.assert_close(R @ R.mT, eye(5))
    torch.testing.assert_close(eye(5) + linalg.cayley_minus_identity(-X), R.mT)
    if size == 0:
        assert torch.equal(R, eye(5))


def test_cayley_keeps_what_a_difference_would_lose():
    """Its diagonal is of order X². In R itself, all of that is rounded away beside the 1."""
    X = linalg.skew(1e-5 * torch.randn(3), 3)
    given, expected = linalg.cayley_minus_identity(X), linalg.cayley_minus_identity(X.double())
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    "function",
    [linalg.cayley_minus_identity, lambda X: torch.cat(linalg.compact_wy(X))],
    ids=["cayley", "compact_wy"],
)
def test_small_solves_run_in_float32_under_autocast(function):
    """Called from `apply`, say. bfloat16 would round their Gram matrices."""
    X = linalg.skew(torch.randn(10), 5)
    with torch.autocast("cpu", torch.bfloat16):
        given = function(X)
    assert given.dtype == torch.float32
    assert torch.equal(given, function(X))


# decompositions


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 7), (7, 3)], ids=str)
def test_top_svd_of_all_triplets(shape):
    """With r = min(m, n) the factors give W back."""
    W = torch.randn(shape, **F64)
    for niter in (None, 2):
        U, S, V = linalg.top_svd(W, min(shape), niter, torch.Generator().manual_seed(0))
        torch.testing.assert_close(U * S @ V, W)
        torch.testing.assert_close(U.mT @ U, eye(min(shape)))
        torch.testing.assert_close(V @ V.mT, eye(min(shape)))


def test_top_svd_of_a_matrix_without_rank():
    """The factors are finite and orthonormal even if W has fewer than r directions."""
    W = torch.zeros(6, 4, **F64)
    W[2] = torch.randn(4, **F64)
    for matrix in (W, torch.zeros(6, 4, **F64)):
        for niter in (None, 4):
            U, S, V = linalg.top_svd(matrix, 3, niter, torch.Generator().manual_seed(0))
            torch.testing.assert_close(U * S @ V, matrix)
            torch.testing.assert_close(U.mT @ U, eye(3))
            assert (S >= 0).all()


SPECTRA = {
    "decaying": lambda i: (i + 1) ** -0.5,
    "steep": lambda i: 10 ** (-i / 3),
    "flat": torch.ones_like,
    "in pairs": lambda i: (i // 2 + 1) ** -0.5,
    "of rank 5": lambda i: (i < 5) / (i + 1),
    "outliers": lambda i: torch.where(i < 3, 1e4, (i + 1) ** -0.5),
    "tiny": lambda i: 1e-20 * (i + 1) ** -0.5,
    "huge": lambda i: 1e20 * (i + 1) ** -0.5,
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)], ids=str)
def test_svd_by_eigenvectors(spectrum, shape):
    """It is exact to the rounding of float32, where torch's own errs by 1e-6, on a GPU by 1e-3."""
    S = spectrum(torch.arange(24, **F64))
    U, V = (torch.linalg.qr(torch.randn(n, 24, **F64)).Q for n in shape)
    W = (U * S @ V.mT).float()
    for r in (4, 24):
        found, values, right = (t.double() for t in linalg.svd_by_eigenvectors(W, r))
        assert (values - S[:r]).abs().max() < 2e-7 * S[0]
        assert (found.mT @ found - eye(r)).abs().max() < 2e-7
        assert (right @ right.mT - eye(r)).abs().max() < 2e-7
        left = (W.double() - found * values @ right).norm()  # the best that is left over is S[r:]
        assert left - S[r:].norm() < 2e-7 * S.norm()


def test_svds_of_a_stack():
    W = torch.randn(3, 5, 4)
    for way in (linalg.top_svd, linalg.svd_by_eigenvectors):
        U, S, V = way(W, 2)
        for k, one in enumerate(W):
            best = torch.linalg.svd(one, full_matrices=False)
            left = one - (best[0][:, :2] * best[1][:2]) @ best[2][:2]
            torch.testing.assert_close(one - (U[k] * S[k]) @ V[k], left, rtol=1e-4, atol=1e-5)


def test_top_svd_of_an_ill_conditioned_matrix():
    """Of singular values over 14 orders of magnitude, the large ones keep their digits."""
    Q, P = (torch.linalg.qr(torch.randn(8, 8, **F64)).Q for _ in range(2))
    S = 10.0 ** -torch.arange(0, 16, 2, **F64)
    found = linalg.top_svd(Q * S @ P, 4)[1]
    torch.testing.assert_close(found, S[:4], rtol=1e-8, atol=0)


def test_top_svd_computes_in_float32_under_autocast():
    W = torch.randn(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        U, S, V = linalg.top_svd(W, 6, niter=2, generator=torch.Generator().manual_seed(0))
    assert U.dtype == S.dtype == V.dtype == torch.float32
    torch.testing.assert_close(U * S @ V, W, rtol=1e-5, atol=1e-5)
    assert linalg.top_svd(W.bfloat16(), 2)[0].dtype == torch.float32
    assert linalg.top_svd(W.double(), 2)[0].dtype == torch.float64


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_matrix_root(rank):
    """The root exists for a singular matrix, and for one with eigenvalues rounded below zero."""
    X = torch.randn(5, rank, **F64)
    C = X @ X.mT - 1e-17 * eye(5)
    root = linalg.matrix_root(C, 1e-3)
    torch.testing.assert_close(root @ root, C + 1e-3 * eye(5))
    torch.testing.assert_close(root, root.mT)
    below = linalg.matrix_root(-1e-3 * eye(5), 1e-6)  # further below zero than eps is above
    torch.testing.assert_close(below, 1e-3 * eye(5))


# draws


def test_draws_come_from_the_generator():
    generator = torch.Generator().manual_seed(3)
    first = linalg.kaiming(4, 9, generator)
    state = torch.get_rng_state()
    assert not torch.equal(first, linalg.kaiming(4, 9, generator))
    assert torch.equal(first, linalg.kaiming(4, 9, torch.Generator().manual_seed(3)))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.float32
    assert first.abs().max() <= 1 / 3
    assert linalg.uniform((0, 2), 1.0, generator).shape == (0, 2)


def test_draws_are_uniform_about_zero():
    """Within the bound, on both sides: 1000 draws have a mean within 5 of its deviations."""
    draw = linalg.uniform((1000,), 3.0, torch.Generator().manual_seed(0))
    assert draw.abs().max() <= 3
    assert draw.mean().abs() < 5 * 3 / 3000**0.5
    assert draw.abs().mean() == pytest.approx(1.5, rel=0.1)
