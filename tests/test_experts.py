"""Fused experts of transformers, with each implementation, against merged models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from models import largest, trained
from torch.utils._python_dispatch import TorchDispatchMode

import lora_func as lf

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
LATENT: dict[str, Any] = {  # DeepSeek's attention and router
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
JAMBA: dict[str, Any] = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {}),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {}),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", {}),
    "deepseek-v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", LATENT),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {}),
    "granite-moe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", {}),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", {"interleave_moe_layer_step": 1}),
    "jamba": ("JambaConfig", "JambaForCausalLM", JAMBA),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {}),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
TARGETS = lf.Targets(parameters=(r"experts\.(gate_up|down)_proj$",))
IDS = torch.arange(1, 25).reshape(4, 6)


def build(name: str, experts: str = "eager") -> Any:
    config, model, fields = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(hf, model)(getattr(hf, config)(**{**SMALL, **fields})).eval()
        for parameter in made.parameters():  # some start at zero
            torch.nn.init.normal_(parameter, std=0.2)
    made.config._experts_implementation = experts
    return made.requires_grad_(False)


def batch() -> dict[str, Any]:
    return {"input_ids": IDS, "labels": IDS, "use_cache": False}


def cases() -> list:
    return [
        pytest.param(name, way, id=f"{name}-{way}")
        for name in MODELS
        # Llama 4 has one way of its own, and Jamba's router suits all of them.
        for way in (IMPLEMENTATIONS if name != "llama4" else ("eager",))
    ]


@pytest.mark.parametrize(("name", "way"), cases())
def test_experts(name, way):
    """The base at init, merged weights' gradients, every expert alive, the base untouched."""
    model = build(name, way)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=TARGETS)
    layers = 1 if name in ("deepseek-v3", "jamba") else 2  # the other one is dense
    assert len(adapter.targets) == 2 * layers
    assert torch.equal(adapter(model, params, batch()).logits, model(**batch()).logits)
    params = trained(params)
    loss, grads = lf.value_and_grad(lambda p: adapter(model, p, batch()).loss)(params)

    def merged(p):
        weights = lf.merge(adapter, model, p)
        return torch.func.functional_call(model, weights, (), batch()).loss

    expected, wanted = lf.value_and_grad(merged)(params)
    torch.testing.assert_close(loss, expected)
    scale = max(grad.abs().max() for grad in wanted.values())
    assert largest(grads, wanted) < 1e-4 * scale
    found = lf.probe(adapter, model, params, batch())
    assert (found.inert, found.dead, found.base_unchanged) == ((), (), True)


@pytest.mark.parametrize(("name", "way"), cases())
def test_a_population_of_experts(name, way):
    """Each example through experts of its own equals one example after the other."""
    model = build(name, way)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=TARGETS)
    several = [trained(params) for _ in range(len(IDS))]
    together = adapter(model, lf.stack(several), {"input_ids": IDS}).logits
    for ids, one, out in zip(IDS, several, together):
        torch.testing.assert_close(out, adapter(model, one, {"input_ids": ids[None]}).logits[0])


@pytest.mark.parametrize("variant", [lf.PiSSA(r=2), lf.LoRA(r=2, rslora=True), lf.AntiPaSTO(r=4)])
def test_other_low_rank_variants(variant):
    """No dense tensor is formed for what has factors."""
    model = build("qwen3-moe", "grouped_mm")
    adapter, params = lf.adapt(model, variant, targets=TARGETS)
    params = trained(params)
    weights = lf.merge(adapter, model, params)
    expected = torch.func.functional_call(model, weights, (), batch()).logits
    torch.testing.assert_close(adapter(model, params, batch()).logits, expected)


def test_no_dense_delta_is_formed():
    """Neither forward nor backward makes a tensor of the size of the stack."""
    model = build("qwen3-moe", "grouped_mm")
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=TARGETS)
    leaves = {key: leaf.requires_grad_() for key, leaf in trained(params).items()}
    held = {parameter.data_ptr() for parameter in model.parameters()}
    made = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.data_ptr() not in held:
                made.add(out.numel())
            return out

    with Shapes():
        adapter(model, leaves, batch()).loss.backward()
    experts = model.model.layers[0].mlp.experts
    assert made.isdisjoint({experts.gate_up_proj.numel(), experts.down_proj.numel()})
    assert len(made) > 10


def test_generation_with_adapted_experts():
    """Decoding through a bound view continues as the merged model does, also with beams."""
    model = build("mixtral", "grouped_mm")
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=TARGETS)
    params = trained(params)
    module = lf.bind(adapter, model, params)
    merged = build("mixtral", "grouped_mm")
    merged.load_state_dict(lf.merge(adapter, model, params), strict=False)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    given = module.generate(IDS, **options)
    assert torch.equal(given, merged.generate(IDS, **options))


def test_a_mixed_batch_generates():
    """Prompts with experts of their own, through one bound view."""
    model = build("mixtral", "grouped_mm")
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=TARGETS)
    several = [trained(params) for _ in range(len(IDS))]
    module = lf.bind(adapter, model, lf.stack(several))
    given = module.generate(IDS, max_new_tokens=4, do_sample=False)
    for ids, one, out in zip(IDS, several, given):
        alone = lf.bind(adapter, model, one)
        assert torch.equal(out, alone.generate(ids[None], max_new_tokens=4, do_sample=False)[0])


def test_tokens_that_are_not_those_of_the_examples():
    model = build("mixtral")
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=TARGETS)
    with pytest.raises(lf.LoraFuncError, match="5 examples"):
        adapter(model, lf.stack([trained(params) for _ in range(5)]), batch())
