"""The claims of OFT, ROAD and VeRA: invariances, special cases and hyperparameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from cases import over
from models import adapted, text_batch, tiny_llama
from torch import Tensor

import lora_func as lf
from lora_func.testing import Layer

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
OFTS, ROADS = ("oft", "oft-neumann", "oft-shared"), ("road", "road-2", "road-4")


def rotation(layer: Layer) -> Tensor:
    """R [d_in, d_in] of x' = x R, block by block, by the formula."""
    variant: Any = layer.variant
    b, d_in = variant.block_size, layer.weight.shape[1]
    blocks = []
    for v in layer.trained["v"].expand(d_in // b, -1):
        Q = torch.zeros(b, b, dtype=torch.float64)
        Q[tuple(torch.triu_indices(b, b, 1))] = v
        Q, eye = Q - Q.mT, torch.eye(b, dtype=torch.float64)
        if variant.terms is None:
            blocks.append((eye + Q) @ torch.linalg.inv(eye - Q))
        else:
            powers = [torch.linalg.matrix_power(Q, k) for k in range(variant.terms - 1)]
            blocks.append((eye + Q) @ torch.stack(powers).sum(0))
    return torch.block_diag(*blocks)


# OFT


@over(*OFTS)
def test_oft_is_the_dense_formula(layer, data):
    R = rotation(layer)
    x = layer.variant.transform_input(layer.x, layer.trained)
    torch.testing.assert_close(x, layer.x @ R, **CLOSE)
    W, _ = layer.variant.merged(layer.weight, layer.trained)
    torch.testing.assert_close(W, layer.weight.matrix @ R.mT, **CLOSE)


@over("oft", "oft-shared")
def test_oft_is_a_rotation(layer, data):
    """The rotation keeps |x| and W Wᵀ, and -v gives its inverse."""
    turn = layer.variant.transform_input
    x = turn(layer.x, layer.trained)
    torch.testing.assert_close(x.norm(dim=-1), layer.x.norm(dim=-1), **CLOSE)
    torch.testing.assert_close(turn(x, {"v": -layer.trained["v"]}), layer.x, **CLOSE)
    W, _ = layer.variant.merged(layer.weight, layer.trained)
    torch.testing.assert_close(W @ W.mT, layer.weight.matrix @ layer.weight.matrix.mT, **CLOSE)


@over(*OFTS)
def test_oft_blocks_do_not_meet(layer, data):
    """A block of x' depends only on the same block of x."""
    b = layer.variant.block_size
    other = layer.x.clone()
    other[:, :b] += 1
    x, y = (layer.variant.transform_input(t, layer.trained) for t in (layer.x, other))
    assert torch.equal(x[:, b:], y[:, b:])
    assert not torch.equal(x[:, :b], y[:, :b])


@pytest.mark.parametrize("terms", [4, 5, 8])
def test_the_series_approaches_the_rotation(terms):
    """The error of R is (I + Q) Q^(k-1) (I - Q)⁻¹, so R is orthogonal up to |Q|^(k-1)."""
    v = 0.05 * torch.randn(3, 6, dtype=torch.float64)
    exact, series = lf.OFT(block_size=4), lf.OFT(block_size=4, terms=terms)
    Q = torch.linalg.matrix_norm((exact.turn(v) / 2), 2).max()
    off = torch.linalg.matrix_norm(exact.turn(v) - series.turn(v), 2).max()
    assert 0 < off <= 2 * (1.2 * Q) ** (terms - 1)


# ROAD


@over(*ROADS)
def test_road_is_the_formula_of_its_kind(layer, data):
    """The output is c y + s rot(y) for each group, with alpha = 1 + a."""
    variant, p, y = layer.variant, layer.trained, layer.base(layer.x)
    g, half = variant.group_size, variant.group_size // 2
    theta, alpha = p["theta"], 1 + p["a"]
    expected = torch.empty_like(y)
    for start in range(0, y.shape[-1], g):
        for i in range(half):
            first, second = start + i, start + half + i
            if variant.kind == "road_1":
                c = s = (start // 2 + i,) * 2
            elif variant.kind == "road_2":
                c = s = first, second
            else:
                c = 2 * start + i, 2 * start + half + i
                s = 2 * start + g + i, 2 * start + g + half + i
            cos = [alpha[k] * theta[k].cos() for k in c]
            sin = [alpha[k] * theta[k].sin() for k in s]
            expected[:, first] = cos[0] * y[:, first] - sin[0] * y[:, second]
            expected[:, second] = cos[1] * y[:, second] + sin[1] * y[:, first]
    torch.testing.assert_close(layer.at({}), expected, **CLOSE)


@over("road")
def test_road_rotates_and_scales_pairs(layer, data):
    """|alpha| scales the length of a pair. Angles add, scales multiply, both have an inverse."""
    variant, p, y = layer.variant, layer.trained, layer.base(layer.x)

    def turn(y, p):
        return variant.apply(None, y, layer.weight, p)

    def pairs(y):
        return y.unflatten(-1, (-1, 2, variant.group_size // 2))

    lengths = pairs(y).norm(dim=-2).flatten(-2) * (1 + p["a"]).abs()
    torch.testing.assert_close(pairs(turn(y, p)).norm(dim=-2).flatten(-2), lengths, **CLOSE)
    twice = {"theta": 2 * p["theta"], "a": (1 + p["a"]) ** 2 - 1}
    torch.testing.assert_close(turn(turn(y, p), p), turn(y, twice), **CLOSE)
    inverse = {"theta": -p["theta"], "a": 1 / (1 + p["a"]) - 1}
    torch.testing.assert_close(turn(turn(y, p), inverse), y, **CLOSE)


@over("road")
def test_the_kinds_of_road_contain_each_other(layer, data):
    """road_2 and road_4 with tied parameters equal road_1."""
    p, g = layer.trained, layer.variant.group_size
    y, expected = layer.base(layer.x), layer.at({})
    both = {n: t.reshape(-1, 1, g // 2).expand(-1, 2, -1).flatten() for n, t in p.items()}
    four = {n: t.reshape(-1, 1, g).expand(-1, 2, -1).flatten() for n, t in both.items()}
    for kind, params in (("road_2", both), ("road_4", four)):
        variant = dataclasses.replace(layer.variant, kind=kind)
        out = variant.apply(layer.x, y, layer.weight, params)
        torch.testing.assert_close(out, expected, **CLOSE)


# VeRA


@over("vera")
def test_vera_sees_products_alone(layer, data):
    """The update is linear in lb, ld and lb can trade a factor, and the rank is at most r."""
    lb, ld, base = layer.trained["lb"], layer.trained["ld"], layer.base(layer.x)
    torch.testing.assert_close(layer.at({"lb": 3 * lb}) - base, 3 * (layer.at({}) - base), **CLOSE)
    torch.testing.assert_close(layer.at({"lb": lb / 2, "ld": 2 * ld}), layer.at({}), **CLOSE)
    W, _ = layer.variant.merged(layer.weight, layer.trained)
    rank = torch.linalg.matrix_rank(W - layer.weight.matrix, atol=1e-12)  # rounding of W
    assert rank <= layer.variant.r


def test_vera_slices_what_a_layer_needs(tmp_path):
    """All layers slice one pair of matrices, sized for the largest; the file stores it once."""
    model, adapter, params = adapted(lf.VeRA(r=6), tiny_llama(), targets=lf.Targets())
    assert set(adapter.frozen) == {"shared.lora_A", "shared.lora_B"}
    A, B = adapter.frozen["shared.lora_A"], adapter.frozen["shared.lora_B"]
    assert (A.shape, B.shape) == ((6, 48), (48, 6))
    assert A.abs().max() <= math.sqrt(6 / 48)
    path = "model.layers.0.self_attn.k_proj"
    W = lf.merge(adapter, model, params)[f"{path}.weight"]
    lb, ld = params[f"{path}.lora_lb"], params[f"{path}.lora_ld"]
    explicit = lb[:, None] * (B[:24] * ld) @ A[:, :32]
    torch.testing.assert_close(W - model.get_submodule(path).weight, explicit, rtol=0, atol=1e-6)
    lf.save(tmp_path / "a.safetensors", adapter, params)
    again, loaded = lf.load(tmp_path / "a.safetensors", model, check_base="error")
    batch = text_batch()
    assert torch.equal(again(model, loaded, batch).logits, adapter(model, params, batch).logits)
    fresh = again.init(model)
    assert {leaf.unique().numel() for leaf in fresh.values()} == {1}  # lb = 0, ld = 0.1


# hyperparameters


bad: Any = lf  # for calls that a type checker refuses, too


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bad.OFT(block_size=1), r"OFT\(block_size=1\): block_size must be at least 2"),
        (lambda: bad.OFT(terms=3), r"OFT\(terms=3\): terms must be at least 4, or None"),
        (lambda: bad.OFT(share=1), "share must be False or True"),
        (lambda: bad.ROAD(group_size=7), r"ROAD\(group_size=7\): group_size must be even"),
        (lambda: bad.ROAD(kind="road_3"), "kind must be 'road_1' or 'road_2' or 'road_4'"),
        (lambda: bad.VeRA(d_initial=0.0), "d_initial must not be 0"),
        (lambda: bad.VeRA(r=0), r"VeRA\(r=0\): r must be an integer of at least 1"),
    ],
)
def test_hyperparameters_are_checked(make, message):
    with pytest.raises(lf.LoraFuncError, match=message):
        make()


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (
            lf.OFT(block_size=5),
            r"q_proj': OFT\(block_size=5\) on a layer with 32 inputs: block_size",
        ),
        (
            lf.ROAD(group_size=64),
            r"q_proj': ROAD\(group_size=64\) on a layer with 48 outputs: group",
        ),
    ],
)
def test_sizes_that_do_not_divide_the_layer(variant, message):
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(tiny_llama(), variant)
