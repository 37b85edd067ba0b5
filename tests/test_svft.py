"""`SVFT`: which entries of its matrix are trained, in each pattern."""

from __future__ import annotations

import pytest
import torch
from cases import over

import lora_func as lf
from lora_func.testing import check_variant

SVFTS = ("svft", "svft-banded", "svft-random")


def entries(variant: lf.SVFT, weight: lf.Weight, seed: int = 0) -> torch.Tensor:
    """1 where an entry of M is trained, `[r, r]`."""
    params = variant.init(weight, torch.Generator().manual_seed(seed))
    ones = {"m": torch.ones(variant.n), **params.frozen}
    _, B = variant.pair(ones)
    return (params.frozen["U"].mT @ B).round(decimals=4)


@over(*SVFTS)
def test_the_dense_formula(layer, data):
    """W_eff = W + U M V"""
    U, V, m = (layer.trained[name] for name in ("U", "V", "m"))
    M = torch.diag(m) if layer.variant.pattern == "plain" else m.new_zeros(len(V), len(V))
    if "rows" in layer.trained:
        for i, j, value in zip(layer.trained["rows"], layer.trained["cols"], m):
            M[i, j] = value
    b = layer.weight.bias
    expected = layer.x @ (layer.weight.matrix + U @ M @ V).mT + (0 if b is None else b)
    torch.testing.assert_close(layer.at({}), expected, rtol=1e-9, atol=1e-9)


@over("svft")
def test_plain_trains_singular_values(layer, data):
    """U and V stay the singular vectors: Uᵀ W_eff Vᵀ is diagonal, S + m."""
    W, _ = layer.variant.merged(layer.weight, layer.trained)
    U, V, m = (layer.trained[name] for name in ("U", "V", "m"))
    S = torch.linalg.svdvals(layer.weight.matrix)[: len(m)]
    torch.testing.assert_close(U.mT @ W @ V.mT, torch.diag(S + m), rtol=1e-9, atol=1e-9)


def test_banded():
    weight = lf.Weight(torch.randn(10, 7))
    i = torch.arange(6)
    for d in (1, 2, 5):
        variant = lf.SVFT(r=6, pattern="banded", d=d)
        expected = ((i[:, None] - i).abs() <= d).float()
        torch.testing.assert_close(entries(variant, weight), expected)
        assert variant.n == expected.sum() == 6 * (2 * d + 1) - d * (d + 1)


def test_random_has_as_many_and_the_seed_decides():
    weight, variant = lf.Weight(torch.randn(10, 7)), lf.SVFT(r=6, pattern="random", d=2)
    first, second, other = (entries(variant, weight, seed) for seed in (0, 0, 1))
    assert first.sum() == variant.n == 24
    assert set(first.flatten().tolist()) == {0, 1}
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_topk_takes_the_best_aligned_pairs():
    weight, variant = lf.Weight(torch.randn(9, 9)), lf.SVFT(r=6, pattern="topk", d=1)
    U, _, V = torch.linalg.svd(weight.matrix)
    alignment = (U[:, :6].mT @ V[:6].mT).abs()
    taken = entries(variant, weight).bool()
    assert taken.sum() == variant.n == 16
    assert alignment[taken].min() >= alignment[~taken].max()


def test_topk_keeps_the_laws_on_square_layers():
    check_variant(lf.SVFT(r=4, pattern="topk", d=1), shapes=[(6, 6), (16, 16)])


def test_what_is_refused():
    with pytest.raises(lf.LoraFuncError, match=r"SVFT\(r=4, d=4\): d must be below r"):
        lf.SVFT(r=4, pattern="banded", d=4)
    with pytest.raises(lf.LoraFuncError, match=r"shape \(3, 4\): .* the weight must be square"):
        lf.SVFT(r=2, pattern="topk", d=1).init(lf.Weight(torch.randn(3, 4)), None)


def test_a_file_without_singular_vectors(tmp_path):
    """In the plain pattern only: elsewhere the product depends on their signs."""
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 12)), torch.randn(3, 8)
    everywhere = lf.Targets(roles=())
    adapter, params = lf.adapt(model, lf.SVFT(r=4), targets=everywhere)
    params = {key: torch.randn_like(leaf) for key, leaf in params.items()}
    lf.save(tmp_path / "a.safetensors", adapter, params, frozen="rebuild")
    again, loaded = lf.load(tmp_path / "a.safetensors", model)
    torch.testing.assert_close(again(model, loaded, x), adapter(model, params, x))
    adapter, params = lf.adapt(model, lf.SVFT(r=4, pattern="banded", d=1), targets=everywhere)
    with pytest.raises(lf.LoraFuncError):
        lf.save(tmp_path / "b.safetensors", adapter, params, frozen="rebuild")
