"""`RandLoRA`: the sum over its bases, their sizes, and the rank."""

from __future__ import annotations

import pytest
import torch
from cases import over

import lora_func as lf


@over("randlora")
def test_the_update_is_a_sum_over_pairs(layer, data):
    """Column k of B, with the basis before the rank, and row k of S, with the rank before it."""
    variant, p = layer.variant, {name: t.double() for name, t in layer.trained.items()}
    delta = variant.merged(layer.weight, p)[0] - layer.weight.matrix
    d_out, d_in = delta.shape
    d, r = min(d_out, d_in), variant.r
    n = -(-d // r)
    expected = torch.zeros(max(d_out, d_in), d, dtype=torch.float64)
    for k in range(r * n):
        i, j = divmod(k, n)
        b = p["basis_B"][: len(expected), k // r, k % r]
        expected += (
            variant.alpha / r * p["lam"][i, j] * b[:, None] * p["basis_A"][i, 0, :d] * p["gam"][j]
        )
    expected = expected if d_out >= d_in else expected.mT
    torch.testing.assert_close(delta, expected, rtol=1e-9, atol=1e-9)


def test_one_pair_of_bases_serves_layers_of_any_shape():
    """Of PEFT's sizes: from the largest d_out and the largest d_in, even of different layers."""
    weights = [lf.Weight(torch.randn(shape)) for shape in ((6, 20), (17, 5), (8, 8))]
    variant = lf.RandLoRA(r=3)
    shared = variant.init_shared(weights, torch.Generator().manual_seed(0)).frozen
    assert shared["basis_A"].shape == (3, 1, 17)
    assert shared["basis_B"].shape == (20, 6, 3)
    for weight in weights:
        own = {**variant.init(weight, None).trainable, **shared}
        x, base_out = torch.randn(4, weight.shape[1]), torch.randn(4, weight.shape[0])
        own["lam"] = torch.randn_like(own["lam"])
        merged = variant.merged(weight, own)[0] - weight.matrix
        out = variant.apply(x, base_out, weight, own)
        torch.testing.assert_close(out, base_out + x @ merged.mT, rtol=1e-4, atol=1e-4)


def test_variance_and_rank():
    """Bases of variance 1; scales that differ make an update of full rank."""
    weight, variant = lf.Weight(torch.zeros(40, 64)), lf.RandLoRA(r=8)
    shared = variant.init_shared([weight], torch.Generator().manual_seed(0)).frozen
    for basis in shared.values():
        assert basis.var().item() == pytest.approx(1.0, rel=0.15)
    own = {**shared, "lam": torch.ones(8, 5), "gam": torch.randn(5, 40)}
    assert torch.linalg.matrix_rank(variant.merged(weight, own)[0]) == 40
