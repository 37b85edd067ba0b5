"""Tiny random models of many types, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as tf
from packaging.version import Version
from torch import Tensor, nn

import lora_func as lf

CURRENT = Version(tf.__version__) >= Version("5.23")
Fields = dict[str, Any]  # of a config
SIZES: Fields = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED: Fields = {**SIZES, "num_key_value_heads": 2}
SPECIAL: Fields = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION: Fields = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
# Encoder-decoders. BART and Whisper share names of fields.
T5: Fields = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}


def text(low: int = 3, high: int = 60, rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(low, high, (rows, length))


def tokens() -> dict[str, Tensor]:
    ids = text()
    return {"input_ids": ids, "labels": ids}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def image_and_text() -> dict[str, Tensor]:
    return {**image(), "input_ids": text(length=7)}


def image_in_text() -> dict[str, Tensor]:
    return {**image(), "input_ids": torch.cat([torch.full((2, 4), 63), text(length=5)], dim=1)}


def speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 20), "labels": text(length=6)}


def sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 400)}


def model_of(name: str, config: str, **sizes: Any) -> Callable[[], Any]:
    """Looks classes up when it is called, so a class that is missing fails its own test alone."""
    return lambda: getattr(tf, name)(getattr(tf, config)(**sizes))


def decoder(name: str, **sizes: Any) -> Callable[[], Any]:
    return model_of(f"{name}ForCausalLM", f"{name}Config", **sizes)


def encoder(name: str, **sizes: Any) -> Callable[[], Any]:
    return model_of(f"{name}ForMaskedLM", f"{name}Config", **{**SIZES, **sizes})


def clip() -> nn.Module:
    return tf.CLIPModel(tf.CLIPConfig(text_config=SIZES, vision_config=VISION, projection_dim=16))


def siglip() -> nn.Module:
    text_config = {**SIZES, "projection_size": 32}
    return tf.SiglipModel(tf.SiglipConfig(text_config=text_config, vision_config=VISION))


def llava() -> nn.Module:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**GROUPED),
        image_token_index=63,
        image_seq_length=4,
    )
    return tf.LlavaForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 4,
    }
    config = tf.Qwen2VLConfig(
        text_config={**GROUPED, **SPECIAL, "rope_parameters": sections},
        vision_config=vision,
        image_token_id=63,
        video_token_id=62,
        vision_start_token_id=61,
        vision_end_token_id=60,
    )
    return tf.Qwen2VLForConditionalGeneration(config)


def patches_in_text() -> dict[str, Tensor]:
    """Four patches of each image become one token."""
    image = torch.tensor([61, 63, 63, 63, 63]).expand(2, -1)
    ids = torch.cat([image, text(high=59, length=5)], dim=1)
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == 63).int(),
    }


class VisionNet(nn.Module):
    """Like timm's models: convolutions first, linear layers in the head only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 5)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.stem(pixel_values))


EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}
DEEPSEEK = {
    **SIZES,
    **LATENT,
    **ROUTED,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "position_buckets": 8,
    "max_relative_positions": 16,
}
MOE = {**EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPTJ = {**GPT2, "n_positions": 64, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
MAMBA2 = {
    **SMALL,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
}
WHISPER = {
    **BART,
    **SPECIAL,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 20,
    "decoder_start_token_id": 1,
}


def without_intermediate_size(sizes: dict[str, int]) -> dict[str, int]:
    return {key: size for key, size in sizes.items() if key != "intermediate_size"}


OPT = {**without_intermediate_size(SIZES), "ffn_dim": 48, "word_embed_proj_dim": 32}
DINOV2 = {**without_intermediate_size(VISION), "mlp_ratio": 2}
WAVLM = {
    **without_intermediate_size(SIZES),
    "intermediate_size": 48,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
JAMBA = {
    **EXPERTS,
    **SPECIAL,
    "num_experts": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_dt_rank": 4,
    "mamba_d_state": 8,
    "use_mamba_kernels": False,
}
GRIFFIN = {
    **GROUPED,
    **SPECIAL,
    "lru_width": 32,
    "attention_window_size": 16,
    "block_types": ["recurrent", "attention"],
}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (1, 1),
    "num_heads": (2, 4),
    "window_size": 4,
}
BEIT = {**VISION, "use_relative_position_bias": True, "layer_scale_init_value": 0.5}
CONVBERT = {"num_groups": 2, "embedding_size": 16, "conv_kernel_size": 3}
MOBILEBERT = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
SWITCH = {
    **T5,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_decoder_layers": 2,
    "num_experts": 2,
    "expert_capacity": 64,
}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 24,
}
ZAMBA = {
    **SIZES,
    "num_key_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_headdim": 8,
    "n_mamba_heads": 8,
    "mamba_ngroups": 1,
    "chunk_size": 8,
    "layers_block_type": ["mamba", "hybrid"],
    "num_mem_blocks": 1,
    "adapter_rank": 4,
    "use_mamba_kernels": False,
}
CODEBOOKS = {**GROUPED, "max_position_embeddings": 9, "num_codebooks": 9}


class Architecture(NamedTuple):
    """A tiny model."""

    make: Callable[[], Any]
    batch: Callable[[], dict[str, Tensor]]
    layers: int  # number of layers that are adapted by default
    parameters: int  # number of parameters that it has and uses
    read: str | None = None  # regex: layers whose weight it reads, and which it never calls


DT_PROJ = r"dt_proj$" if CURRENT else None  # an older Mamba calls it
ARCHITECTURES = {
    "llama": Architecture(decoder("Llama", **GROUPED), tokens, 14, 21),
    "qwen2": Architecture(decoder("Qwen2", **GROUPED), tokens, 14, 27),
    "qwen3": Architecture(decoder("Qwen3", **GROUPED, head_dim=12), tokens, 14, 25),
    "qwen3_moe": Architecture(decoder("Qwen3Moe", **MOE), tokens, 8, 25),
    "mistral": Architecture(decoder("Mistral", **GROUPED, head_dim=8), tokens, 14, 21),
    "mixtral": Architecture(decoder("Mixtral", **EXPERTS, num_local_experts=4), tokens, 8, 21),
    "gpt_oss": Architecture(
        decoder("GptOss", **EXPERTS, head_dim=8, num_local_experts=4), tokens, 8, 37
    ),
    "gemma2": Architecture(decoder("Gemma2", **GROUPED, **SPECIAL, head_dim=8), tokens, 14, 24),
    "gemma3": Architecture(
        model_of("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, **SPECIAL, head_dim=8),
        tokens,
        14,
        28,
    ),
    "phi": Architecture(decoder("Phi", **SIZES), tokens, 12, 33),
    "phi3": Architecture(decoder("Phi3", **GROUPED, **SPECIAL), tokens, 8, 15),
    "gpt2": Architecture(model_of("GPT2LMHeadModel", "GPT2Config", **GPT2), tokens, 8, 28),
    "gptj": Architecture(decoder("GPTJ", **GPTJ), tokens, 12, 25),
    "gpt_neox": Architecture(decoder("GPTNeoX", **SIZES), tokens, 8, 28),
    "opt": Architecture(decoder("OPT", **OPT), tokens, 12, 36),
    "bloom": Architecture(
        decoder("Bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4), tokens, 8, 29
    ),
    "falcon": Architecture(decoder("Falcon", **SMALL, num_attention_heads=4), tokens, 8, 15),
    "olmo2": Architecture(decoder("Olmo2", **GROUPED, **SPECIAL), tokens, 14, 25),
    "cohere": Architecture(decoder("Cohere", **GROUPED, **SPECIAL), tokens, 14, 18),
    "deepseek_v3": Architecture(decoder("DeepseekV3", **DEEPSEEK), tokens, 14, 30),
    "granite": Architecture(decoder("Granite", **GROUPED), tokens, 14, 21),
    "smollm3": Architecture(decoder("SmolLM3", **GROUPED, **SPECIAL), tokens, 14, 20),
    "stablelm": Architecture(decoder("StableLm", **GROUPED), tokens, 14, 26),
    "starcoder2": Architecture(decoder("Starcoder2", **GROUPED), tokens, 12, 35),
    "mamba": Architecture(decoder("Mamba", **SMALL, state_size=8), tokens, 4, 22, read=DT_PROJ),
    "mamba2": Architecture(decoder("Mamba2", **MAMBA2), tokens, 4, 21),
    "bert": Architecture(encoder("Bert"), tokens, 13, 42),
    "roberta": Architecture(encoder("Roberta"), tokens, 12, 42),
    "electra": Architecture(encoder("Electra", embedding_size=16), tokens, 14, 44),
    "deberta": Architecture(encoder("Deberta", **DEBERTA), tokens, 13, 42),
    "deberta_v2": Architecture(encoder("DebertaV2", **DEBERTA), tokens, 13, 42),
    "modernbert": Architecture(
        encoder("ModernBert", **SPECIAL, cls_token_id=1, sep_token_id=2), tokens, 9, 17
    ),
    "t5": Architecture(model_of("T5ForConditionalGeneration", "T5Config", **T5), tokens, 32, 47),
    "bart": Architecture(
        model_of("BartForConditionalGeneration", "BartConfig", **BART, max_position_embeddings=64),
        tokens,
        16,
        49,
    ),
    "whisper": Architecture(
        model_of("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
        speech,
        16,
        50,
    ),
    "vit": Architecture(
        model_of("ViTForImageClassification", "ViTConfig", **VISION), image, 12, 40
    ),
    "dinov2": Architecture(model_of("Dinov2Model", "Dinov2Config", **DINOV2), image, 12, 42),
    "clip": Architecture(clip, image_and_text, 26, 78),
    "siglip": Architecture(siglip, image_and_text, 27, 88),
    "llava": Architecture(llava, image_in_text, 28, 46),
    "timm-like": Architecture(VisionNet, image, 3, 10),
    "jamba": Architecture(decoder("Jamba", **JAMBA), tokens, 9, 29, read=DT_PROJ),
    "recurrent_gemma": Architecture(decoder("RecurrentGemma", **GRIFFIN), tokens, 13, 36),
    "qwen2_vl": Architecture(qwen2_vl, patches_in_text, 23, 58),
    "beit": Architecture(
        model_of("BeitForImageClassification", "BeitConfig", **BEIT), image, 12, 43
    ),
    "swinv2": Architecture(
        model_of("Swinv2ForImageClassification", "Swinv2Config", **SWIN), image, 7, 49
    ),
    "wavlm": Architecture(
        model_of("WavLMForCTC", "WavLMConfig", **WAVLM),
        sound,
        5,
        54,
        read=r"attention\.(q|k|v|out)_proj$",
    ),
    "convbert": Architecture(encoder("ConvBert", **CONVBERT), tokens, 12, 58),
    "mobilebert": Architecture(
        encoder("MobileBert", **MOBILEBERT), tokens, 10, 105, read=r"predictions\.dense$"
    ),
    "convnext": Architecture(
        model_of(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            **CONVNEXT,
            layer_scale_init_value=0.5,
        ),
        image,
        2,
        30,
    ),
    "switch": Architecture(
        model_of(
            "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", **SWITCH
        ),
        tokens,
        38,
        53,
    ),
    "qwen3_next": Architecture(decoder("Qwen3Next", **MOE, **LINEAR_ATTENTION), tokens, 15, 34),
    "zamba2": Architecture(decoder("Zamba2", **ZAMBA), tokens, 9, 31),
    "csm": Architecture(
        model_of(
            "CsmDepthDecoderForCausalLM",
            "CsmDepthDecoderConfig",
            **CODEBOOKS,
            backbone_hidden_size=32,
        ),
        tokens,
        15,
        22,
    ),
}

if not CURRENT:  # they have or use other layers there
    for name in ("jamba", "recurrent_gemma", "switch", "zamba2"):
        del ARCHITECTURES[name]

# What people adapt beside linear layers: pattern -> (variant, number of targets).
LOW_RANK, DENSE = lf.LoRA(r=2), lf.Full()
Asked = dict[str, tuple[lf.Variant, int]]
CLIP_ASKED: Asked = {r"(q|v)_proj$": (LOW_RANK, 8), r"patch_embedding$": (LOW_RANK, 1)}
ASKED: dict[str, Asked] = {
    "clip": {**CLIP_ASKED, r"token_embedding$": (LOW_RANK, 1), r"logit_scale$": (DENSE, 1)},
    "siglip": {
        **CLIP_ASKED,
        r"in_proj_weight$": (LOW_RANK, 1),
        r"head\.attention\.out_proj\.weight$": (LOW_RANK, 1),
        r"probe$": (LOW_RANK, 1),
    },
    "whisper": {r"(q|v)_proj$": (LOW_RANK, 6), r"encoder\.conv\d$": (LOW_RANK, 2)},
    "mamba": {
        r"(in|x|out)_proj$": (LOW_RANK, 6),
        r"dt_proj\.weight$": (LOW_RANK, 2),
        r"conv1d$": (LOW_RANK, 2),
        r"A_log$": (LOW_RANK, 2),
        r"mixer\.D$": (DENSE, 2),
    },
    "mamba2": {
        r"(in|out)_proj$": (LOW_RANK, 4),
        r"conv1d$": (LOW_RANK, 2),
        r"(A_log|dt_bias|mixer\.D)$": (DENSE, 6),
    },
    "jamba": {
        r"experts\.(gate_up|down)_proj$": (LOW_RANK, 2),
        r"self_attn\.(q|v)_proj$": (LOW_RANK, 2),
        r"mamba\.(in|x|out)_proj$": (LOW_RANK, 3),
        r"dt_proj\.weight$": (LOW_RANK, 1),
        r"A_log$": (LOW_RANK, 1),
        r"router\.weight$": (LOW_RANK, 1),
    },
    "recurrent_gemma": {
        r"(input|recurrent)_gate_weight$": (LOW_RANK, 2),
        r"linear_(x|y|out)$": (LOW_RANK, 3),
        r"recurrent_param$": (DENSE, 1),
        r"conv_1d$": (LOW_RANK, 1),
    },
    "qwen2_vl": {
        r"visual.*attn\.(qkv|proj)$": (LOW_RANK, 4),
        r"language_model.*(q|v)_proj$": (LOW_RANK, 4),
        r"merger\.mlp\.\d$": (LOW_RANK, 2),
        r"patch_embed\.proj$": (LOW_RANK, 1),
    },
    "beit": {
        r"(query|value|q_proj|v_proj)$": (LOW_RANK, 4),
        r"relative_position_bias_table$": (LOW_RANK, 2),
        r"patch_embeddings\.projection$": (LOW_RANK, 1),
        r"lambda_[12]$": (DENSE, 4),
    },
    "swinv2": {
        r"(query|value)$": (LOW_RANK, 4),
        r"continuous_position_bias_mlp\.[02]$": (LOW_RANK, 4),
        r"logit_scale$": (DENSE, 2),
    },
    "wavlm": {
        r"attention\.(q|k|v|out)_proj\.weight$": (LOW_RANK, 8),
        r"gru_rel_pos_linear$": (LOW_RANK, 2),
        r"rel_attn_embed$": (LOW_RANK, 1),
        r"conv_layers\.\d\.conv$": (LOW_RANK, 2),
    },
    "convbert": {
        r"intermediate\.dense\.weight$": (LOW_RANK, 2),
        r"output\.dense\.weight$": (LOW_RANK, 4),
        r"(depth|point)wise\.weight$": (LOW_RANK, 4),
    },
    "mobilebert": {r"(query|value)$": (LOW_RANK, 4), r"predictions\.dense\.weight$": (LOW_RANK, 1)},
    "convnext": {r"dwconv$": (LOW_RANK, 2), r"layer_scale_parameter$": (DENSE, 2)},
    "csm": {r"codebooks_head\.weight$": (LOW_RANK, 1), r"embed_tokens$": (LOW_RANK, 1)},
}
ASKED = {name: asked for name, asked in ASKED.items() if name in ARCHITECTURES}
