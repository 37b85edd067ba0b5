"""Parameters that stay floating in a quantized model, and those that are packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import largest, state_of, trained
from transformers import BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

import lora_func as lf

IDS = torch.arange(1, 13).reshape(2, 6)
BATCH: dict[str, Any] = {"input_ids": IDS, "labels": IDS, "use_cache": False}
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(params=["nf4", "int8"])
def model(request, tmp_path):
    """A mixture of experts as `from_pretrained` quantizes it: its linear layers, but no stack."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_local_experts": 4,
    }
    MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(tmp_path)
    packing = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    config = BitsAndBytesConfig(**packing.get(request.param, {"load_in_8bit": True}))
    place = {"device_map": {"": "cpu"}, "dtype": torch.float32}
    return MixtralForCausalLM.from_pretrained(tmp_path, quantization_config=config, **place).eval()


def test_what_stays_floating_is_adapted_and_trains(model):
    rules = {"experts": lf.LoRA(r=2), "embed_tokens": lf.LoRA(r=2), "q_proj": lf.LoRA(r=2)}
    rules |= {r"norm\.weight$": lf.Full(), "lm_head": lf.Full()}
    model.requires_grad_(False)(**BATCH)  # on some CPUs, bitsandbytes packs anew in the first one
    before = state_of(model)
    adapter, params = lf.adapt(model, rules)
    assert torch.equal(adapter(model, params, BATCH).logits, model(**BATCH).logits)
    params = trained(params)
    _, grads = lf.value_and_grad(lambda p: adapter(model, p, BATCH).loss)(params)
    assert all(grad.abs().max() > 0 for grad in grads.values())
    leaves = {key: leaf.clone() for key, leaf in params.items()}
    lf.bind(adapter, model, leaves)(**BATCH).loss.backward()
    given: Any = {key: leaf.grad for key, leaf in leaves.items()}
    assert largest(given, grads) < 1e-6
    merged = lf.merge(adapter, model, params)
    assert {t.dtype for t in merged.values()} == {torch.float32}
    assert state_of(model) == before


def test_a_packed_one_is_refused_by_name(model):
    message = r"'model.layers.0.self_attn.q_proj.weight' of a Linear\w+ is packed .* Name its layer"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(parameters=(r"q_proj",)))
