"""An adapter of a packed model, merged into a float checkpoint that transformers loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import adapted, text_batch, tiny_llama
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import lora_func as lf

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TARGETS = lf.Targets(names=(r"(q|v|down)_proj$",))


@pytest.fixture
def load(tmp_path) -> Any:
    """Loads one checkpoint, packed to 4 bit."""
    tiny_llama(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(
        tmp_path / "base"
    )
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    place: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": torch.float32}

    def load() -> Any:
        path = tmp_path / "base"
        model = LlamaForCausalLM.from_pretrained(path, quantization_config=config, **place)
        return model.requires_grad_(False)

    return load


@pytest.mark.parametrize("variant", [lf.LoRA(r=4), lf.DoRA(r=4)], ids=lambda v: v.name())
def test_a_packed_model_with_its_adapter(variant, load, tmp_path):
    """Its logits are those of the merged checkpoint. In train mode the packed kernel is exact."""
    packed, adapter, params = adapted(variant, load().train(), targets=TARGETS)
    batch = text_batch()
    expected = adapter(packed, params, batch).logits
    merged = lf.merge(adapter, packed, params)
    whole = load().dequantize()
    whole.load_state_dict(merged, strict=False)
    whole.save_pretrained(tmp_path / "merged", max_shard_size="40KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(loaded, "hf_quantizer")
    torch.testing.assert_close(loaded(**batch).logits, expected)


@pytest.mark.parametrize(
    ("variant", "r"),  # DoRA's change has full rank
    [(lf.PiSSA(r=4), None), (lf.HRA(r=4), None), (lf.DoRA(r=4), 64)],
    ids=["pissa", "hra", "dora"],
)
def test_a_packed_weight_as_plain_lora(variant, r, load):
    """What depends on the weight reads the dequantized one."""
    packed, adapter, params = adapted(variant, load().train(), targets=TARGETS)
    plain, leaves = lf.as_lora(adapter, params, r=r, model=packed)
    batch = text_batch()
    expected = adapter(packed, params, batch).logits
    torch.testing.assert_close(plain(packed, leaves, batch).logits, expected, rtol=1e-4, atol=1e-5)
