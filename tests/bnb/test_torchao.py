"""torchao's int8 weights: tensors of a subclass that can dequantize itself."""

from __future__ import annotations

import copy

import pytest
import torch
from models import largest, text_batch, tiny_llama, trained
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import lora_func as lf


@pytest.mark.parametrize(
    "variant", [lf.LoRA(r=4), lf.PiSSA(r=4), lf.DoRA(r=4), lf.DeLoRA(r=4), lf.IA3()], ids=str
)
@pytest.mark.parametrize("config", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig])
def test_on_int8(variant, config):
    """The identity is exact, transforms equal those of the dequantized model, merging is dense."""
    model = tiny_llama(hidden_size=64, intermediate_size=96, attn_implementation="eager")

    def quantized(module, path):
        return isinstance(module, nn.Linear) and "lm_head" not in path

    quantize_(model.requires_grad_(False), config(), filter_fn=quantized)
    plain = copy.deepcopy(model)
    for path, module in list(plain.named_modules()):
        if quantized(module, path):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    batch = text_batch()
    adapter, params = lf.adapt(model, variant)
    assert torch.equal(adapter(model, params, batch).logits, model(**batch).logits)

    params = trained(params)
    tangent = {key: torch.randn_like(leaf) for key, leaf in params.items()}
    f, g = (lambda p, m=m: adapter(m, p, batch).loss for m in (model, plain))
    grads, expected = (torch.func.grad(loss)(params) for loss in (f, g))
    scale = max(1.0, *(leaf.abs().max().item() for leaf in expected.values()))
    assert largest(grads, expected) <= 1e-5 * scale
    slope, same = (torch.func.jvp(loss, (params,), (tangent,))[1] for loss in (f, g))
    torch.testing.assert_close(slope, same, rtol=1e-4, atol=1e-5)
    assert largest(lf.merge(adapter, model, params), lf.merge(adapter, plain, params)) <= 1e-6
