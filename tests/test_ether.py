"""`ETHER` and `ETHERPlus`: the matrices of the paper, and how far they are from the identity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import over

import lora_func as lf
from lora_func.linalg import compact_wy

CLOSE: Any = {"rtol": 1e-9, "atol": 1e-9}


def blocks(*signed: tuple[float, torch.Tensor]) -> torch.Tensor:
    """blockdiag(I + Σ s û ûᵀ), over pairs of a sign and vectors [n, k]."""
    n, k = signed[0][1].shape
    made = [torch.eye(k, dtype=torch.float64) for _ in range(n)]
    for sign, vectors in signed:
        for i, u in enumerate(vectors):
            made[i] = made[i] + sign * torch.outer(u, u) / (u @ u)
    return torch.block_diag(*made)


@over("ether")
def test_ether_is_the_dense_formula(layer, data):
    H = blocks((-2.0, layer.trained["u"]))
    b = 0 if layer.weight.bias is None else layer.weight.bias
    expected = layer.x @ (layer.weight.matrix @ H).mT + b
    torch.testing.assert_close(layer.at({}), expected, **CLOSE)
    # A reflection: it undoes itself, and its distance from the identity is fixed.
    eye = torch.eye(len(H), dtype=H.dtype)
    reflected = layer.variant.transform_input(eye, layer.trained)
    torch.testing.assert_close(reflected, H, **CLOSE)
    torch.testing.assert_close(reflected @ reflected, eye, **CLOSE)
    assert (reflected - eye).norm().item() == pytest.approx(2 * math.sqrt(layer.variant.n))


@over("ether")
def test_one_block_is_one_reflection_of_hra(layer, data):
    """And neither the length of u nor its sign counts."""
    u = layer.trained["u"].flatten()[None]
    V, K = compact_wy(u)
    for vectors in (u, -3 * u):
        x = lf.ETHER(n=1).transform_input(layer.x, {"u": vectors})
        torch.testing.assert_close(x, layer.x - (layer.x @ V.mT) @ K, **CLOSE)


@over("etherplus")
def test_etherplus_is_the_dense_formula(layer, data):
    H_in, H_out = (
        blocks((-1.0, layer.trained[f"u_{side}"]), (1.0, layer.trained[f"v_{side}"]))
        for side in ("in", "out")
    )
    b = 0 if layer.weight.bias is None else layer.weight.bias
    expected = layer.x @ (H_out @ layer.weight.matrix @ H_in.mT).mT + b
    torch.testing.assert_close(layer.at({}), expected, **CLOSE)
    for H in (H_in, H_out):
        assert (H - torch.eye(len(H))).norm() <= 2 * math.sqrt(layer.variant.n) + 1e-9


def test_etherplus_takes_the_start_of_the_authors():
    """v = -u gives the identity too, up to rounding; u = v gives it to the bit."""
    weight = lf.Weight(torch.randn(12, 8))
    params = lf.ETHERPlus(n=2).init(weight, torch.Generator().manual_seed(0)).trainable
    negated = {name: -leaf if name[0] == "v" else leaf for name, leaf in params.items()}
    W, _ = lf.ETHERPlus(n=2).merged(weight, params)
    assert torch.equal(W, weight.matrix)
    torch.testing.assert_close(lf.ETHERPlus(n=2).merged(weight, negated)[0], W)


def test_the_vectors_separate_at_the_first_step():
    """Their gradients are opposite at u = v."""
    bias = torch.randn(12)
    variant, weight = lf.ETHERPlus(n=2), lf.Weight(torch.randn(12, 8), bias)
    params = variant.init(weight, torch.Generator().manual_seed(0)).trainable
    x = torch.randn(5, 8)

    def loss(p):
        z = variant.transform_input(x, p)
        return variant.apply(x, z @ weight.matrix.mT + bias, weight, p).sin().sum()

    grads = torch.func.grad(loss)(params)
    for side in ("in", "out"):
        assert grads[f"u_{side}"].abs().max() > 0.1
        torch.testing.assert_close(grads[f"u_{side}"], -grads[f"v_{side}"])


@pytest.mark.parametrize(
    ("variant", "shape", "what"),
    [
        (lf.ETHER(n=3), (4, 8), "8 inputs"),
        (lf.ETHER(n=8), (4, 8), "8 inputs"),  # a block of one can only change its sign
        (lf.ETHERPlus(n=3), (4, 6), "4 outputs"),
    ],
)
def test_blocks_that_do_not_fit(variant, shape, what):
    with pytest.raises(lf.LoraFuncError, match=rf"{what}: n must divide them into blocks of at"):
        variant.init(lf.Weight(torch.randn(shape)), None)
