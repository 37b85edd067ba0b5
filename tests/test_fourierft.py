"""`FourierFT`: its update is a sum of waves, and PEFT's frequencies are leaves."""

from __future__ import annotations

import math

import pytest
import torch
from cases import over

import lora_func as lf


@over("fourierft")
def test_the_update_is_a_sum_of_cosines(layer, data):
    """Σ_t c_t cos(2π (u_t j / d_out + v_t k / d_in)), with rank 2n at most."""
    variant, p = layer.variant, layer.trained
    delta = variant.merged(layer.weight, p)[0] - layer.weight.matrix
    d_out, d_in = delta.shape
    j = torch.arange(d_out, dtype=torch.float64)[:, None]
    k = torch.arange(d_in, dtype=torch.float64)
    expected = torch.zeros_like(delta)
    for c, u, v in zip(p["c"], p["rows"], p["cols"]):
        angle = 2 * math.pi * (u * j / d_out + v * k / d_in)
        expected += variant.alpha / (d_out * d_in) * c * angle.cos()
    torch.testing.assert_close(delta, expected, rtol=1e-9, atol=1e-9)


def test_frequencies_of_peft_are_leaves():
    """`randperm` from the seed 777, as PEFT draws them, in the place of those that init drew."""
    weight, variant = lf.Weight(torch.randn(12, 8)), lf.FourierFT(n=20)
    at = torch.randperm(96, generator=torch.Generator().manual_seed(777))[:20]
    drawn = variant.init(weight, None)
    params = {**drawn.frozen, "c": torch.randn(20), "rows": at // 8, "cols": at % 8}
    spectrum = torch.zeros(96).index_put((at,), params["c"]).reshape(12, 8)
    delta = variant.merged(weight, params)[0] - weight.matrix
    torch.testing.assert_close(delta, 150 * torch.fft.ifft2(spectrum).real)


def test_all_frequencies_and_one_more():
    weight = lf.Weight(torch.randn(3, 4))
    assert len(lf.FourierFT(n=12).init(weight, None).trainable["c"]) == 12
    message = r"FourierFT\(n=13\) on a layer of shape \(3, 4\): n must be at most 12 there"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.FourierFT(n=13).init(weight, None)
