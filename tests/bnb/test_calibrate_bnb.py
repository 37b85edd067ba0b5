"""Calibration on bitsandbytes' layers finds what it finds on the dequantized model."""

from __future__ import annotations

import pytest
import torch
from models import state_of, trained
from test_bnb import batch_on, device, near, over_kinds, pair, pytestmark  # noqa: F401  (a fixture)

import lora_func as lf

ALL = lf.Targets(roles=())


@over_kinds
def test_output_gradients_are_those_of_the_dequantized_weights(kind, device):  # noqa: F811
    """Autograd on the float model is the oracle. The packed weights stay as they are."""
    packed, plain = pair(kind, device)
    batch, paths = batch_on(device), list(ALL.find(packed))
    packed(**batch)  # at its first forward, bitsandbytes moves the scales of 8-bit layers
    before = state_of(packed)
    found = lf.collect(packed, paths, [batch], lf.OutputGradients())
    assert state_of(packed) == before
    assert all(parameter.grad is None for parameter in packed.parameters())
    weights = [plain.get_submodule(path).weight.requires_grad_() for path in paths]
    expected = dict(zip(paths, torch.autograd.grad(plain(**batch).loss, weights)))
    tolerance = 2e-2 if kind == "int8" else 1e-4  # the 8-bit kernel rounds its input
    assert near(found, expected, tolerance)


@pytest.mark.parametrize(
    "variant", [lf.EVA(r=4), lf.CorDA(r=4), lf.LoRAGA(r=4), lf.OLoRA(r=4), lf.MiLoRA(r=4)], ids=str
)
@over_kinds
def test_inits_from_data(variant, kind, device, tmp_path):  # noqa: F811
    """At init the output is that of the quantized base; a file reloads without data, to the bit."""
    model, batch = pair(kind, device)[0].eval(), batch_on(device)
    model(**batch)
    calibration = [batch] if variant.statistic else None
    adapter, params = lf.adapt(model, variant, targets=ALL, calibration=calibration)
    assert torch.equal(adapter(model, params, batch).logits, model(**batch).logits)
    params = trained(params)
    lf.save(tmp_path / "adapter.safetensors", adapter, params)
    again, reloaded = lf.load(tmp_path / "adapter.safetensors", model)
    assert torch.equal(again(model, reloaded, batch).logits, adapter(model, params, batch).logits)
