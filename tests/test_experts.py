"""Fused experts of every family in transformers, against merged models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from architectures import CURRENT
from models import largest, trained
from test_architectures import loss_of, outputs
from torch.utils._python_dispatch import TorchDispatchMode

import lora_func as lf

Fields = dict[str, Any]  # of a config
SMALL: Fields = {
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
    "eos_token_id": 2,
}
HEADS: Fields = {  # of DeepSeek's latent attention
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
GROUPS: Fields = {"n_group": 2, "topk_group": 1}  # of experts
LATENT: Fields = {
    **HEADS,
    **GROUPS,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
}
INDEXED: Fields = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2}  # sparse attention
SPARSE: Fields = {"mlp_layer_types": ["sparse", "sparse"]}
MIXED: Fields = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR: Fields = {  # of Qwen's linear attention
    **MIXED,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 24,
}
LINEAR_HEADS: Fields = {**MIXED, "linear_head_dim": 8, "linear_num_heads": 4}
SECTIONS: Fields = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "mrope_section": [1, 1, 2],
    }
}
INKLING: Fields = {
    "n_routed_experts": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 16,
}
JAMBA: Fields = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
GRANITE_HYBRID: Fields = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "layer_types": ["mamba", "attention"],
}
NEMOTRON: Fields = {
    "n_routed_experts": 4,
    "moe_shared_expert_intermediate_size": 24,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "n_groups": 1,
}
ERNIE_VL: Fields = {
    **SPARSE,
    **SECTIONS,
    "moe_intermediate_size": [24, 24],
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
}
QWEN4: Fields = {
    **LINEAR,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "hc_count": 2,
}
LONGCAT: Fields = {
    **HEADS,
    "num_layers": 2,
    "ffn_hidden_size": 24,
    "expert_ffn_hidden_size": 24,
    "q_lora_rank": 16,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
}
DBRX: Fields = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "ffn_config": {
        "hidden_size": 32,
        "ffn_hidden_size": 24,
        "moe_num_experts": 4,
        "moe_top_k": 2,
    },
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
}


EXPERTS = r"\bexperts\.(gate_up|up|down)_proj$"


class Family(NamedTuple):
    """A tiny model with experts."""

    model: str
    config: str
    adapted: int  # number of parameters that the pattern names
    fields: Fields
    pattern: str = EXPERTS


def causal(name: str, adapted: int = 4, **fields: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", adapted, fields)


def text(name: str, adapted: int = 4, **fields: Any) -> Family:
    """The text model of one that sees, too."""
    return Family(f"{name}TextModel", f"{name}TextConfig", adapted, fields)


# Two stacks for each layer; two in all where the other layer is dense.
FAMILIES = {
    "mixtral": causal("Mixtral"),
    "qwen3_moe": causal("Qwen3Moe"),
    "gpt_oss": causal("GptOss"),
    "deepseek_v3": causal("DeepseekV3", 2, **LATENT),
    "olmoe": causal("Olmoe"),
    "granitemoe": causal("GraniteMoe"),
    "llama4": Family("Llama4ForCausalLM", "Llama4TextConfig", 4, {"interleave_moe_layer_step": 1}),
    "jamba": causal("Jamba", 2, **JAMBA),
    "phimoe": causal("Phimoe"),
    # The rest, with one implementation.
    "afmoe": causal("Afmoe", 2),
    "aria": Family("AriaTextForCausalLM", "AriaTextConfig", 4, {}),
    "axk1": causal("AXK1", 2, **LATENT),
    "axk2": causal("AXK2", 2, **LATENT),
    "bailing_hybrid": causal(
        "BailingHybrid", **HEADS, **GROUPS, **SPARSE, **MIXED, num_mtp_layers=0
    ),
    "beam": causal("Beam", **GROUPS, **SPARSE),
    "cohere2_moe": causal("Cohere2Moe"),
    "deepseek_ocr2": text(
        "DeepseekOcr2", 2, n_routed_experts=4, mlp_layer_types=["dense", "sparse"]
    ),
    "deepseek_v2": causal("DeepseekV2", 2, **LATENT),
    "deepseek_v32": causal("DeepseekV32", 2, **LATENT),
    "deepseek_v4": causal("DeepseekV4", **LATENT),
    "diffusion_gemma": Family(
        "DiffusionGemmaEncoderTextModel", "DiffusionGemmaTextConfig", 4, {"top_k_experts": 2}
    ),
    "dots1": causal("Dots1", n_shared_experts=1, n_routed_experts=4, n_group=1, topk_group=1),
    "dots3_note": text("Dots3Note", **LATENT, **SPARSE),
    "ernie4_5_moe": causal("Ernie4_5_Moe", 2),
    "ernie4_5_vl_moe": text("Ernie4_5_VLMoe", 8, **ERNIE_VL),
    "exaone_moe": causal("ExaoneMoe", 2),
    "flex_olmo": causal("FlexOlmo"),
    "flint": causal("Flint", shared_expert_intermediate_size=24, mlp_only_layers=[]),
    "gemma4": text("Gemma4", enable_moe_block=True, top_k_experts=2, hidden_size_per_layer_input=0),
    "glm4_moe": causal("Glm4Moe", 2),
    "glm4_moe_lite": causal("Glm4MoeLite", 2, **LATENT),
    "glm4v_moe": text("Glm4vMoe", 2, **SECTIONS, n_routed_experts=4),
    "glm5_next": text(
        "Glm5Next",
        **{**LATENT, **LINEAR_HEADS, **INDEXED, **SPARSE, "n_group": 1, "qk_rope_head_dim": 0},
        index_kpool=2,
        head_dim=0,
    ),
    "glm_moe_dsa": causal("GlmMoeDsa", 2, **LATENT),
    "granitemoe_swa": causal("GraniteMoeSWA"),
    "granitemoehybrid": causal("GraniteMoeHybrid", **GRANITE_HYBRID),
    "granitemoeshared": causal("GraniteMoeShared"),
    "hunyuan_v1_moe": causal("HunYuanMoEV1"),
    "hy_v3": causal("HYV3", 2),
    "hy_v4": causal("HYV4", 2, **LATENT, **INDEXED, head_dim=16),
    "inkling": text("Inkling", **INKLING, n_shared_experts=1),
    "inkling2": text("Inkling2", **INKLING, unpadded_vocab_size=64),
    "kimi_linear": causal("KimiLinear", **HEADS, **LINEAR_HEADS, **SPARSE),
    "kolibri1": causal("Kolibri1"),
    "laguna": causal("Laguna", 2),
    "lfm2_moe": causal("Lfm2Moe", 2, layer_types=["conv", "full_attention"], num_dense_layers=1),
    "mellum": causal("Mellum"),
    "mimo_v2_flash": causal("MiMoV2Flash", 2),
    "minimax": causal("MiniMax"),
    "minimax_m2": causal("MiniMaxM2"),
    "minimax_m3_vl": text("MiniMaxM3VL"),
    "mistral4": causal("Mistral4", 2, **LATENT, head_dim=16),
    "mistral_large4": text("MistralLarge4", **HEADS, **INDEXED, **SPARSE, n_routed_experts=4),
    "muse_spark": text("MuseSpark", moe_hidden_size=16),
    "nemotron_h": causal("NemotronH", 2, **NEMOTRON),
    "openai_privacy_filter": Family(
        "OpenAIPrivacyFilterForTokenClassification", "OpenAIPrivacyFilterConfig", 4, {}
    ),
    "qwen2_moe": causal("Qwen2Moe", shared_expert_intermediate_size=24),
    "qwen3_5_moe": text("Qwen3_5Moe", **LINEAR),
    "qwen3_next": causal("Qwen3Next", **LINEAR),
    "qwen3_omni_moe": Family("Qwen3OmniMoeThinkerTextModel", "Qwen3OmniMoeTextConfig", 4, {}),
    "qwen3_vl_moe": text("Qwen3VLMoe"),
    "qwen4_exp": text("Qwen4Exp", **QWEN4),
    "solar_open": causal("SolarOpen"),
    "unlimited_ocr": text("UnlimitedOcr", 2),
    "zaya": causal("Zaya", num_experts_per_tok=1, router_hidden_size=16),
    # Experts that have one implementation of their own.
    "longcat_flash": causal("LongcatFlash", 2, **LONGCAT),
    "step3p7": text("Step3p7", **SPARSE, n_routed_experts=4, share_expert_dim=24, sliding_window=8),
}
# Those that cannot tell examples apart, each in its own way.
TOGETHER = {
    "ernie4_5_vl_moe": FAMILIES["ernie4_5_vl_moe"],  # it sorts tokens by their kind first
    "dbrx": causal("Dbrx", 6, **DBRX)._replace(pattern=r"experts\.mlp\.(w1|v1|w2)$"),
    "doge": causal("Doge", is_moe=True, num_experts=16, num_experts_per_tok=4)._replace(
        pattern=r"(up|down)_embed\.weight$"
    ),
    "inkling-shared": FAMILIES["inkling"]._replace(
        adapted=6, pattern=r"shared_experts\.(gate|up|down)_proj$"
    ),
    "jetmoe": causal("JetMoe", 8, kv_channels=8)._replace(pattern=r"(in|out)put_linear\.weight$"),
}
# Tested with each implementation.
GRID = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "jamba", "phimoe", "granitemoe")
# An older transformers lacks some families, and holds the experts of others in another way.
OLDER = (*GRID[:-1], "llama4")
APART = {n: own for n, own in FAMILIES.items() if n not in TOGETHER and (CURRENT or n in OLDER)}
MODELS = APART | (TOGETHER if CURRENT else {"jetmoe": TOGETHER["jetmoe"]})
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
TARGETS = lf.Targets(parameters=(EXPERTS,))
IDS = torch.arange(1, 25).reshape(4, 6)


def build(name: str, experts: str = "eager") -> Any:
    family = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(hf, family.model)(getattr(hf, family.config)(**{**SMALL, **family.fields}))
        for parameter in made.parameters():  # some start at zero
            torch.nn.init.normal_(parameter, std=0.2)
    made.config._experts_implementation = experts
    return made.eval().requires_grad_(False)


def batch(name: str = "", rows: slice = slice(None)) -> dict[str, Any]:
    """All four examples or some. Ernie has experts for text, and others for images."""
    given: dict[str, Any] = {"input_ids": IDS[rows], "use_cache": False}
    if name == "ernie4_5_vl_moe":
        given["moe_mm_token_type_ids"] = (IDS[rows] % 3 == 0).int()
    return given


def cases(names: Any = tuple(MODELS)) -> list:
    return [
        pytest.param(name, way, id=f"{name}-{way}")
        for name in names
        for way in (IMPLEMENTATIONS if name in GRID else ("grouped_mm",))
    ]


def test_every_family_of_the_registry_is_here():
    folder = Path(hf.__path__[0]) / "models"
    registered = {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    }
    assert registered - FAMILIES.keys() == set()
    assert registered >= set(GRID[:-1])


@pytest.mark.parametrize(("name", "way"), cases())
def test_experts(name, way):
    """The base at init, merged weights' gradients, every expert alive, the base untouched."""
    model, given = build(name, way), batch(name)
    targets = lf.Targets(parameters=(MODELS[name].pattern,))
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=targets)
    assert len(adapter.targets) == MODELS[name].adapted
    base = outputs(model(**given))
    for out, expected in zip(outputs(adapter(model, params, given)), base, strict=True):
        assert torch.equal(out, expected)

    params = trained(params)
    _, grads = lf.value_and_grad(lambda p: loss_of(adapter(model, p, given)))(params)

    def merged(p):
        return torch.func.functional_call(model, lf.merge(adapter, model, p), (), given)

    _, wanted = lf.value_and_grad(lambda p: loss_of(merged(p)))(params)
    assert_close(outputs(adapter(model, params, given))[0], outputs(merged(params))[0])
    scale = max(grad.abs().max() for grad in wanted.values())
    assert largest(grads, wanted) < 1e-4 * scale
    found = lf.probe(adapter, model, params, given)
    assert (found.inert, found.dead, found.base_unchanged) == ((), (), True)


def assert_close(given: torch.Tensor, expected: torch.Tensor) -> None:
    """In float32, whose products have another order."""
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("name", "way"), cases(APART))
def test_a_population_of_experts(name, way):
    """Each example through experts of its own equals one example after the other."""
    model = build(name, way)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=TARGETS)
    several = [trained(params) for _ in range(len(IDS))]
    together = outputs(adapter(model, lf.stack(several), batch(name)))[0]
    for i, one in enumerate(several):
        alone = outputs(adapter(model, one, batch(name, slice(i, i + 1))))[0]
        assert_close(together[i], alone[0])


@pytest.mark.parametrize("name", [name for name in MODELS if name not in APART])
def test_experts_that_cannot_tell_examples_apart(name):
    model, pattern = build(name), MODELS[name].pattern
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(parameters=(pattern,)))
    several = lf.stack([trained(params) for _ in range(len(IDS))])
    with pytest.raises(lf.LoraFuncError, match="without the example axis"):
        adapter(model, several, batch())


@pytest.mark.parametrize("variant", [lf.PiSSA(r=2), lf.LoRA(r=2, rslora=True), lf.AntiPaSTO(r=4)])
def test_other_low_rank_variants(variant):
    """No dense tensor is formed for what has factors."""
    model = build("qwen3_moe", "grouped_mm")
    adapter, params = lf.adapt(model, variant, targets=TARGETS)
    params = trained(params)
    weights = lf.merge(adapter, model, params)
    expected = torch.func.functional_call(model, weights, (), batch()).logits
    torch.testing.assert_close(adapter(model, params, batch()).logits, expected)


def test_no_dense_delta_is_formed():
    """Neither forward nor backward makes a tensor of the size of the stack."""
    model = build("qwen3_moe", "grouped_mm")
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
        adapter(model, leaves, batch()).logits.sum().backward()
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
