"""Folders that PEFT writes, checked by the rules of vLLM's loader."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import ARCHITECTURES
from models import adapted, text_batch, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

import lora_func as lf
from lora_func.interop import peft as ours
from lora_func.interop import sglang, vllm

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::UserWarning:peft",
    "ignore:.*keys did not match:RuntimeWarning",
)


def folder_of(path: Path, model: Any = None, config: Any = None, **fields: Any) -> Path:
    """A folder as PEFT writes it."""
    config = config or peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **fields})
    peft.get_peft_model(tiny_llama() if model is None else model, config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("fields", "rank"),
    [
        ({}, 8),
        ({"r": 16}, 16),
        ({"r": 17, "use_rslora": True}, 32),
        ({"r": 4, "rank_pattern": {"v_proj": 40}, "alpha_pattern": {"v_proj": 3}}, 64),
        ({"target_modules": r".*(q_proj|down_proj)"}, 8),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, 8),
        ({"init_lora_weights": "gaussian"}, 8),
    ],
)
def test_what_vllm_serves(fields, rank, tmp_path):
    assert vllm.check(folder_of(tmp_path, **fields)) == {"enable_lora": True, "max_lora_rank": rank}


def test_a_classifier(tmp_path):
    model = LlamaForSequenceClassification(tiny_llama().config)
    folder = folder_of(tmp_path, model, task_type="SEQ_CLS")
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    assert vllm.check(folder)["max_lora_rank"] == 8


def test_fused_experts(tmp_path):
    mixtral = ARCHITECTURES["mixtral"][0]
    both = ["experts.down_proj", "experts.gate_up_proj"]
    folder = folder_of(tmp_path / "both", mixtral(), target_parameters=both)
    experts = {"enable_mixed_moe_lora_format": True}
    assert vllm.check(folder) == {"enable_lora": True, "max_lora_rank": 8, **experts}
    ranks = {"rank_pattern": {"experts.gate_up_proj": 16, "experts.down_proj": 32}}
    folder = folder_of(tmp_path / "ranks", mixtral(), target_parameters=both, **ranks)
    assert vllm.check(folder)["max_lora_rank"] == 32
    folder = folder_of(tmp_path / "half", mixtral(), target_parameters=both[:1])
    with pytest.raises(lf.LoraFuncError, match="needs factors of both gate_up_proj and down_proj"):
        vllm.check(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"use_dora": True},
            r"does not do DoRA \(use_dora\); it knows no tensors like .*magnitude",
        ),
        ({"lora_bias": True}, r"a bias of lora_B \(lora_bias\)"),
        ({"bias": "lora_only"}, r"adds no biases \(bias='lora_only'\)"),
        ({"modules_to_save": ["lm_head"]}, r"no whole modules .modules_to_save=..lm_head"),
        ({"trainable_token_indices": [1, 2]}, r"trained rows of an embedding"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' changes the base"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"r": 600}, r"the rank 600 is above 512, vLLM's largest max_lora_rank"),
    ],
)
def test_what_vllm_refuses(fields, message, tmp_path):
    model = tiny_llama(attention_bias="bias" in fields)
    folder = folder_of(tmp_path, model, **fields)
    with pytest.raises(lf.LoraFuncError, match=f"vLLM cannot serve '.*': .*{message}"):
        vllm.check(folder)


def test_another_method(tmp_path):
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(lf.LoraFuncError, match=r"'IA3', and vLLM serves LoRA alone\. .*as_lora"):
        vllm.check(folder_of(tmp_path, config=config))


def test_altered_folders(tmp_path):
    """Each alteration is one that people make."""
    folder = folder_of(tmp_path)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, text = load_file(weights), config.read_text()

    def refused(message: str) -> None:
        with pytest.raises(lf.LoraFuncError, match=message):
            vllm.check(folder)

    save_file({key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}, weights)
    refused(
        r"knows no tensors like .*lora_A\.default\.weight.*; there are no factors of LoRA in it"
    )
    save_file(
        {key: t for key, t in tensors.items() if "layers.1.self_attn.v_proj.lora_B" not in key},
        weights,
    )
    refused(r"A or B is missing of 'model\.layers\.1\.self_attn\.v_proj'")
    save_file(tensors, weights)
    config.write_text(json.dumps({**json.loads(text), "r": 8}))
    refused(r"has factors of the shapes \(4, 32\) and \(48, 4\), and the config says rank 8")
    config.write_text(json.dumps({**json.loads(text), "lora_alpha": "16"}))
    refused("lora_alpha is '16'")
    config.write_text("{")
    refused("adapter_config.json' is not JSON")
    config.write_text(text)
    weights.write_bytes(weights.read_bytes()[:100])
    refused("adapter_model.safetensors' cannot be read")
    weights.unlink()
    refused("no file '.*adapter_model.safetensors': save the adapter as safetensors")
    config.unlink()
    refused("no file '.*adapter_config.json': give a folder in PEFT's format")


def test_an_adapter_of_ours(tmp_path):
    """Of variants that vLLM knows nothing of, made plain, saved, checked, and loaded by PEFT."""
    rules = {"q_proj": lf.LoRA(r=3), "v_proj": lf.PiSSA(r=2), "up_proj": lf.HRA(r=4)}
    targets = lf.Targets(names=tuple(rules))
    model, adapter, params = adapted(rules, targets=targets)
    batch = text_batch()
    expected = adapter(model, params, batch).logits
    ours.save(tmp_path / "own", *lf.as_lora(adapter, params, model=model))
    assert vllm.check(tmp_path / "own") == {"enable_lora": True, "max_lora_rank": 8}
    ours.save(tmp_path / "one", *lf.as_lora(adapter, params, r=4, model=model))
    names = {"lora_target_modules": ["q_proj", "up_proj", "v_proj"]}
    assert sglang.check(tmp_path / "one") == {"enable_lora": True, "max_lora_rank": 4, **names}
    for name in ("own", "one"):
        base = copy.deepcopy(model)
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / name))
        torch.testing.assert_close(loaded(**batch).logits, expected)
