"""Calibration on bitsandbytes' layers: what it says of them is what it says of the dequantized model."""

from __future__ import annotations

import pytest
import torch
from models import largest, state_of, trained
from test_bnb import batch_on, device, over_kinds, pair, pytestmark  # noqa: F401  (a fixture, and the marks of this folder)

import lora_func as lf

ALL = lf.Targets(roles=())


@over_kinds
def test_output_gradients_are_those_of_the_dequantized_weights(kind, device):  # noqa: F811
    """By autograd on the float model; the packed weights require no grad, and stay as they are."""
    packed, plain = pair(kind, device)
    batch, paths = batch_on(device), list(ALL.find(packed))
    before = (
        None if device == "cuda" or kind == "int8" else state_of(packed)
    )  # 8-bit layers move their scales in a forward
    found = lf.collect(packed, paths, [batch], lf.OutputGradients())
    assert before is None or state_of(packed) == before
    assert all(parameter.grad is None for parameter in packed.parameters())
    weights = [plain.get_submodule(path).weight.requires_grad_() for path in paths]
    expected = dict(zip(paths, torch.autograd.grad(plain(**batch).loss, weights)))
    tolerance = 2e-2 if kind == "int8" else 1e-4  # the 8-bit kernel rounds what passes through it
    assert largest(found, expected) <= tolerance * max(
        gradient.abs().max().item() for gradient in expected.values()
    )


@pytest.mark.parametrize(
    "variant", [lf.EVA(r=4), lf.CorDA(r=4), lf.LoRAGA(r=4), lf.OLoRA(r=4), lf.MiLoRA(r=4)], ids=str
)
@over_kinds
def test_inits_from_data(variant, kind, device, tmp_path):  # noqa: F811
    """Identity at init to the bit, on the quantized base; what was trained reloads without data, to the bit."""
    model, batch = pair(kind, device)[0].eval(), batch_on(device)
    model(**batch)
    adapter, params = lf.adapt(
        model, variant, targets=ALL, calibration=[batch] if variant.statistic else None
    )
    assert torch.equal(adapter(model, params, batch).logits, model(**batch).logits)
    params = trained(params)
    lf.save(tmp_path / "adapter.safetensors", adapter, params)
    again, reloaded = lf.load(tmp_path / "adapter.safetensors", model)
    assert torch.equal(again(model, reloaded, batch).logits, adapter(model, params, batch).logits)
