"""`VBLoRA`: sub-vectors of the bank, the two starts, and its checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import over
from torch import nn

import lora_func as lf
from lora_func.variants.vblora import composed

bad: Any = lf


def test_sub_vectors_are_means_of_the_chosen():
    bank = torch.eye(5)
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0], [9.0, 0.0, 0.0, 8.0, 7.0]])
    found = composed(logits, bank, 2)
    high, low = torch.tensor([1.0, 0.0]).softmax(0)
    expected = torch.tensor([[0, high, 0, low, 0], [high, 0, 0, low, 0]])
    torch.testing.assert_close(found, expected)


@over("vblora", "vblora-peft")
def test_only_the_chosen_have_a_gradient(layer, data):
    """topk of the logits of each sub-vector."""
    grads = torch.func.grad(lambda leaves: layer.at(leaves).square().sum())(layer.leaves())
    for name in ("logits_A", "logits_B"):
        moved = (grads[name] != 0).sum(-1)
        assert (moved <= layer.variant.topk).all()


def test_the_starts_differ_by_a_constant():
    """With an anchored bank of zeros, "exact" is the function of PEFT."""
    model, x = nn.Sequential(nn.Linear(8, 12)), torch.randn(3, 8)
    fields: dict[str, Any] = {"r": 2, "num_vectors": 6, "vector_length": 4}
    drawn = [
        lf.adapt(
            model,
            lf.VBLoRA(start=start, **fields),
            targets=lf.Targets(roles=()),
            generator=torch.Generator().manual_seed(0),
        )
        for start in ("exact", "peft")
    ]
    (exact, params), (moved, theirs) = drawn
    assert params.keys() == theirs.keys()
    assert torch.equal(exact(model, params, x), model(x))
    start = moved(model, params, x) - model(x)
    assert 0 < start.norm() < 0.01 * model(x).norm()
    later = {key: leaf + 0.1 * torch.randn_like(leaf) for key, leaf in params.items()}
    difference = moved(model, later, x) - exact(model, later, x)
    torch.testing.assert_close(difference, start, rtol=1e-3, atol=1e-6)
    frozen = {**exact.frozen, "shared.lora_bank0": torch.zeros(6, 4)}
    same = lf.Adapter(exact.variants, exact.shapes, frozen, exact.base, exact.dtype)
    torch.testing.assert_close(same(model, later, x), moved(model, later, x))


def test_one_bank_learns_from_all_layers():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    variant = lf.VBLoRA(num_vectors=6, vector_length=4)
    adapter, params = lf.adapt(model, variant, targets=lf.Targets(roles=()))
    assert [key for key in params if key.endswith("bank")] == ["shared.lora_bank"]
    scales = {key: scale for key, scale in adapter.lr_scale.items() if scale != 1.0}
    assert set(scales.values()) == {10.0}
    assert len(scales) == 4
    x = torch.randn(3, 8)
    grads = torch.func.grad(lambda p: adapter(model, p, x).square().sum())(params)
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_checks():
    with pytest.raises(lf.LoraFuncError, match=r"topk=1, .* at least 2"):
        lf.VBLoRA(topk=1)
    with pytest.raises(lf.LoraFuncError, match=r"topk=9, num_vectors=8\): topk .* at most num_ve"):
        lf.VBLoRA(topk=9, num_vectors=8)
    with pytest.raises(lf.LoraFuncError, match="start must be 'exact' or 'peft'"):
        bad.VBLoRA(start="zero")
    message = r"VBLoRA\(vector_length=256\) .* the nearest that does is 32"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.VBLoRA().init(lf.Weight(torch.zeros(64, 96)), None)
    assert lf.VBLoRA().card.at_init == lf.VBLoRA.card.at_init == "exact"
    assert lf.VBLoRA(start="peft").card.at_init == "moved"
