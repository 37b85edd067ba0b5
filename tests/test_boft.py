"""`BOFT`: the butterfly, as the paper defines it."""

from __future__ import annotations

import pytest
import torch
from cases import over

import lora_func as lf
from lora_func.linalg import skew

BOFTS = ("boft", "boft-2", "boft-3")


def butterfly(v: torch.Tensor, b: int) -> torch.Tensor:
    """B_m .. B_1, with one rotation after the other at its rows and columns."""
    half, d = b // 2, v.shape[1] * b
    chunks = torch.arange(d).reshape(-1, half)
    product = torch.eye(d, dtype=v.dtype)
    for i, own in enumerate(v):
        side, B, pair = 2**i, torch.zeros(d, d, dtype=v.dtype), 0
        for c in range(len(chunks)):
            if c // side % 2 == 0:  # the other half of the pairs are its partners
                at = torch.cat([chunks[c], chunks[c + side]])
                Q, eye = skew(own[pair], b), torch.eye(b, dtype=v.dtype)
                B[at[:, None], at] = (eye + Q) @ torch.linalg.inv(eye - Q)
                pair += 1
        product = B @ product
    return product


@over(*BOFTS)
def test_the_dense_formula(layer, data):
    """out = (1 + ds) (W Rᵀ x) + b"""
    R = butterfly(layer.trained["v"], layer.variant.block_size)
    W = (1 + layer.trained["ds"])[:, None] * (layer.weight.matrix @ R.mT)
    b = layer.weight.bias
    expected = layer.x @ W.mT + (0 if b is None else b)
    torch.testing.assert_close(layer.at({}), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.variant.merged(layer.weight, layer.trained)[0], W)


@over(*BOFTS)
def test_it_is_a_rotation(layer, data):
    """|x'| = |x|"""
    x = layer.variant.transform_input(layer.x, layer.trained)
    torch.testing.assert_close(x.norm(dim=-1), layer.x.norm(dim=-1), rtol=1e-9, atol=1e-9)


@over("boft")
def test_one_factor_is_oft(layer, data):
    oft = lf.OFT(block_size=layer.variant.block_size)
    expected = oft.transform_input(layer.x, {"v": layer.trained["v"][0]})
    turned = layer.variant.transform_input(layer.x, layer.trained)
    torch.testing.assert_close(turned, expected, rtol=1e-9, atol=1e-9)


def test_enough_factors_mix_all_inputs():
    """m = 1 + log2(d / b) gives a dense matrix, and one factor fewer two blocks."""
    for m, blocks in ((4, 1), (3, 2)):
        variant = lf.BOFT(block_size=4, m=m)
        v = torch.randn(m, 8, 6, generator=torch.Generator().manual_seed(0))
        x = variant.transform_input(torch.eye(32), {"v": v, "ds": torch.zeros(3)})
        assert (x.abs() > 1e-6).sum() == 32 * 32 / blocks


def test_what_is_refused():
    with pytest.raises(lf.LoraFuncError, match=r"BOFT\(block_size=3\): block_size must be even"):
        lf.BOFT(block_size=3)
    with pytest.raises(lf.LoraFuncError, match=r"12 inputs: 2\^\(m-1\) block_size = 8 must divide"):
        lf.BOFT(block_size=4, m=2).init(lf.Weight(torch.randn(3, 12)), None)
