"""Adapters in llama.cpp's format, against the loader of transformers, which undoes its layout.

What llama.cpp itself computes was compared by hand: docs/merging.md has the numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from models import VOCABULARY, adapted, text_batch, tiny_llama
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lora_func as lf
from lora_func.interop import gguf as ours

HEADS = {"q_proj": 4, "k_proj": 2}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def model_of(kind: str) -> Any:
    config, model = MODELS[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    rest = {"vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 64}
    return model(config(**sizes, **heads, **rest, tie_word_embeddings=False)).eval()


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {t.name: torch.tensor(t.data.copy()) for t in gguf.GGUFReader(path).tensors}


def write_base(path: Path, model: Any, changes: dict[str, Tensor]) -> None:
    """The model in GGUF, as llama.cpp's converter lays it out, with `changes` added."""
    config, kind = model.config, model.config.model_type
    architecture = "llama" if kind == "mistral" else kind
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(VOCABULARY)
    for key, tensor in model.state_dict().items():
        name: Any = names.get_name(key, try_suffixes=(".weight", ".bias"))
        heads = HEADS.get(key.split(".")[-2])
        if architecture == "llama" and heads:
            d = len(tensor) // heads
            order = [i // 2 + (i % 2) * d // 2 for i in range(d)]  # 0, d / 2, 1, d / 2 + 1, ..
            tensor = torch.cat([head[order] for head in tensor.split(d)])  # noqa: PLW2901
        writer.add_tensor(name, (tensor + changes.get(name, 0)).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", MODELS)
def test_in_the_layout_of_llama_cpp(kind, tmp_path):
    """The file's own change, added to the base in GGUF, is the adapted model in transformers."""
    rules = {r"(q|o|up)_proj": lf.LoRA(r=4), r"(k|v)_proj": lf.PiSSA(r=3), "down_proj": lf.HRA(r=2)}
    rules["lm_head"] = lf.LoRA(r=2)
    model, adapter, params = adapted(
        rules, model_of(kind), targets=lf.Targets(exclude=(), roles=())
    )
    path = tmp_path / "adapter.gguf"
    ours.save(path, adapter, params, model)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == ("llama" if kind == "mistral" else kind)
    found = tensors_of(path)
    assert len(found) == 2 * len(adapter.targets)
    alpha, changes = fields["adapter.lora.alpha"], {}
    for name, A in found.items():
        if name.endswith(".lora_a"):
            B = found[name.replace("lora_a", "lora_b")]
            changes[name.removesuffix(".lora_a")] = alpha / len(A) * B @ A
    write_base(tmp_path / "merged.gguf", model, changes)
    config = {"config": model.config} if kind == "qwen3" else {}  # of which it misses head_dim
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf", **config)
    batch = text_batch()
    expected = adapter(model, params, batch).logits
    torch.testing.assert_close(whole.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert (model(**batch).logits - expected).abs().max() > 1e-2


def test_one_rank_keeps_its_factors(tmp_path):
    """Then alpha is the rank, and the scale 1."""
    model, adapter, params = adapted(lf.LoRA(r=4, alpha=8.0), targets=lf.Targets(names=("v_proj",)))
    ours.save(tmp_path / "adapter.gguf", adapter, params, model)
    found = tensors_of(tmp_path / "adapter.gguf")
    A, B = (params[f"model.layers.1.self_attn.v_proj.lora_{name}"] for name in "AB")
    assert torch.equal(found["blk.1.attn_v.weight.lora_a"], A)
    assert torch.equal(found["blk.1.attn_v.weight.lora_b"], 2 * B)


def test_what_is_refused(tmp_path):
    path = tmp_path / "adapter.gguf"
    path.write_text("old")

    def refused(message: str, rules: Any = None, model: Any = None, **options: Any) -> None:
        model, adapter, params = adapted(rules, model, **options)
        with pytest.raises(lf.LoraFuncError, match=message):
            ours.save(path, adapter, params, model)
        assert path.read_text() == "old"

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY))
    message = "type 'gpt2' is not among those .* 'llama', 'mistral', .* convert_lora_to_gguf.py"
    refused(message, model=gpt2, targets=lf.Targets(names=("c_attn",)))
    refused("DoRA changes the weight by no product of low rank", lf.DoRA(r=2))
    refused(r"'model\.layers\.0\.self_attn\.q_proj': .* adds a bias", lf.LoRA(r=2, add_bias=True))
    embedding = {"embed_tokens": lf.LoRA(r=2)}
    refused("'model.embed_tokens' is no linear layer", embedding, targets=lf.Targets())
    head = {"targets": lf.Targets(names=("lm_head",), exclude=())}
    tied = tiny_llama(tie_word_embeddings=True)
    refused(
        "'lm_head' is tied to the embedding, and llama.cpp holds the two as one", None, tied, **head
    )
    _, adapter, params = adapted()
    with pytest.raises(lf.LoraFuncError, match="model must be of type Module, not"):
        ours.save(path, adapter, params, params)  # pyright: ignore[reportArgumentType]


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    model, adapter, params = adapted()
    with pytest.raises(
        lf.LoraFuncError, match="GGUF files need the package gguf: pip install gguf"
    ):
        ours.save(tmp_path / "adapter.gguf", adapter, params, model)
