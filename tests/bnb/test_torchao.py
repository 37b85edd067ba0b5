"""torchao's weight-only int8, behind the same seam: a tensor subclass that knows how to unpack itself."""

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
    """The identity is exact; transforms equal those of the dequantized model; merging is dense."""
    model = tiny_llama(
        hidden_size=64, intermediate_size=96, attn_implementation="eager"
    ).requires_grad_(False)
    quantize_(
        model,
        config(),
        filter_fn=lambda module, path: isinstance(module, nn.Linear) and "lm_head" not in path,
    )
    plain = copy.deepcopy(model)
    for path, module in list(plain.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in path:
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    batch = text_batch()
    adapter, params = lf.adapt(model, variant)
    assert torch.equal(adapter(model, params, batch).logits, model(**batch).logits)

    params = trained(params)
    f, g = (lambda p, m=m: adapter(m, p, batch).loss for m in (model, plain))
    tolerance = 1e-5 * max(
        1, *(leaf.abs().max().item() for leaf in torch.func.grad(g)(params).values())
    )
    assert largest(torch.func.grad(f)(params), torch.func.grad(g)(params)) <= tolerance
    tangent = {key: torch.randn_like(leaf) for key, leaf in params.items()}
    torch.testing.assert_close(
        torch.func.jvp(f, (params,), (tangent,))[1],
        torch.func.jvp(g, (params,), (tangent,))[1],
        rtol=1e-4,
        atol=1e-5,
    )
    assert largest(lf.merge(adapter, model, params), lf.merge(adapter, plain, params)) <= 1e-6
