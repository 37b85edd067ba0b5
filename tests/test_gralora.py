"""`GraLoRA`: a product of rank r / k in each block, and its checks."""

from __future__ import annotations

import pytest
import torch
from cases import over

import lora_func as lf


@over("gralora", "gralora-hybrid")
def test_each_block_has_its_own_factors(layer, data):
    """Block (j, n) is s times columns j of A_n times rows n of B_j, beside the plain LoRA."""
    variant, p = layer.variant, layer.trained
    k, s = variant.k, variant.r // variant.k
    delta = variant.merged(layer.weight, p)[0] - layer.weight.matrix
    if variant.hybrid_r:
        delta = delta - variant.scale * p["B_h"] @ p["A_h"]
    d_out, d_in = delta.shape
    blocks = delta.reshape(k, d_out // k, k, d_in // k)
    for j in range(k):
        for n in range(k):
            A, B = p["A"][n][:, j * s : (j + 1) * s], p["B"][j][n * s : (n + 1) * s]
            expected = variant.scale * (A @ B).mT
            torch.testing.assert_close(blocks[j, :, n], expected, rtol=1e-9, atol=1e-9)


@over("lora")
def test_one_block_is_lora(layer, data):
    r, alpha = layer.variant.r, layer.variant.alpha
    A, B = layer.trained["A"].mT[None], layer.trained["B"].mT[None]
    variant = lf.GraLoRA(r=r, alpha=alpha, k=1)
    out = variant.apply(layer.x, layer.base(layer.x), layer.weight, {"A": A, "B": B})
    torch.testing.assert_close(out, layer.at({}), rtol=1e-9, atol=1e-9)


def test_the_rank_is_k_times_that_of_as_many_numbers():
    weight, variant = lf.Weight(torch.zeros(48, 64)), lf.GraLoRA(r=8, k=4)
    params = variant.init(weight, None).trainable
    assert sum(leaf.numel() for leaf in params.values()) == 8 * (48 + 64)
    params["B"] = torch.randn_like(params["B"])
    assert torch.linalg.matrix_rank(variant.merged(weight, params)[0]) == 32


def test_checks():
    with pytest.raises(lf.LoraFuncError, match=r"GraLoRA\(r=7, k=2\): r must be .* such as 6"):
        lf.GraLoRA(r=7)
    with pytest.raises(lf.LoraFuncError, match=r"r=2, k=4\): r must be a multiple .* such as 4"):
        lf.GraLoRA(r=2, k=4)
    with pytest.raises(lf.LoraFuncError, match=r"hybrid_r=-1\): hybrid_r must be an integer"):
        lf.GraLoRA(hybrid_r=-1)
    message = r"GraLoRA\(k=5\) .* must divide both sizes; the nearest that does is 4 or 8"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.GraLoRA(r=10, k=5).init(lf.Weight(torch.zeros(16, 24)), None)
