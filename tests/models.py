"""Small models, parameters and batches for all tests, and a digest of a model's state."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from cases import data_for
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import lora_func as lf
from lora_func.testing import rounding_at_init

VOCABULARY = 64


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 16, bias),
        nn.GELU(),
        nn.Linear(16, 16, bias),
        nn.GELU(),
        nn.Linear(16, 4, bias),
    )


# The models are typed Any: a type checker sees `Tensor | Module` in every attribute of a module.


def tiny_llama(**changes: Any) -> Any:
    """A LlamaForCausalLM of two layers, with grouped-query attention and random weights.

    d_in and d_out differ in every kind of layer.
    """
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
    }
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=0,
        **{**sizes, **changes},
    )
    return LlamaForCausalLM(config).eval()


def qwen3_600m() -> Any:
    """A Qwen3ForCausalLM in the shape of Qwen/Qwen3-0.6B, without weights."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return Qwen3ForCausalLM(config)


def text_batch(rows: int = 3, length: int = 10, pad: str = "right") -> dict[str, Tensor]:
    """Token ids with labels, and a mask that pads the first row."""
    ids = torch.randint(1, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    if pad == "left":
        mask = mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trained(params: dict[str, Tensor], noise: float = 0.1) -> dict[str, Tensor]:
    """Parameters as if after training: noise moves them away from their start."""
    return {key: leaf + noise * torch.randn_like(leaf) for key, leaf in params.items()}


def state_of(model: nn.Module) -> str:
    """A digest of everything that a call could change.

    It covers bytes, versions, gradients, flags, hooks, attributes and structure.
    """
    digest = hashlib.sha256()

    def add(*facts: Any) -> None:
        digest.update(repr(facts).encode())

    for name, t in (*model.named_parameters(), *model.named_buffers()):
        add(name, id(t), t._version, t.requires_grad, t.grad is None, t.dtype, t.shape)
        digest.update(t.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    for name, module in model.named_modules():
        add(name, id(module), type(module), module.training)
        for attribute, value in vars(module).items():
            entries = list(value.items()) if isinstance(value, dict) else []
            add(attribute, id(value), [(str(key), id(entry)) for key, entry in entries])
    return digest.hexdigest()


def adapted(
    rules: Any = None, model: Any = None, **options: Any
) -> tuple[Any, lf.Adapter, dict[str, Tensor]]:
    """A tiny Llama with an adapter on q_proj and v_proj; its parameters are as if trained."""
    model = tiny_llama() if model is None else model
    options.setdefault("targets", lf.Targets(names=(r"q_proj$", r"v_proj$")))
    options = {**data_for(rules, model, options["targets"]), **options}
    adapter, params = lf.adapt(model, lf.LoRA(r=4) if rules is None else rules, **options)
    return model, adapter, trained(params)


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two flat dicts."""
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def assert_at_base(variant: lf.Variant, given: Tensor, base: Tensor, layers: int = 4) -> None:
    """`given` is the base output, bit by bit or within the rounding of that many layers."""
    error = rounding_at_init(variant, given.dtype)
    if error == 0:
        assert torch.equal(given, base)
    assert (given - base).abs().max() <= layers * error * base.abs().max()


def checkpoint_activations(model: Any, use_reentrant: bool) -> None:
    """Calls transformers' own switch, whose name depends on the installed version."""
    switch = getattr(model, "activation_checkpointing_enable", None)
    switch = switch or model.gradient_checkpointing_enable
    switch({"use_reentrant": use_reentrant})
