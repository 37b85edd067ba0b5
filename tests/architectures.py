"""Tiny random models of many types, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

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

# name -> (model, batch, number of layers that are adapted by default)
ARCHITECTURES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]], int]] = {
    "llama": (decoder("Llama", **GROUPED), tokens, 14),
    "qwen2": (decoder("Qwen2", **GROUPED), tokens, 14),
    "qwen3": (decoder("Qwen3", **GROUPED, head_dim=12), tokens, 14),
    "qwen3_moe": (decoder("Qwen3Moe", **MOE), tokens, 8),
    "mistral": (decoder("Mistral", **GROUPED, head_dim=8), tokens, 14),
    "mixtral": (decoder("Mixtral", **EXPERTS, num_local_experts=4), tokens, 8),
    "gpt_oss": (decoder("GptOss", **EXPERTS, head_dim=8, num_local_experts=4), tokens, 8),
    "gemma2": (decoder("Gemma2", **GROUPED, **SPECIAL, head_dim=8), tokens, 14),
    "gemma3": (
        model_of("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, **SPECIAL, head_dim=8),
        tokens,
        14,
    ),
    "phi": (decoder("Phi", **SIZES), tokens, 12),
    "phi3": (decoder("Phi3", **GROUPED, **SPECIAL), tokens, 8),
    "gpt2": (model_of("GPT2LMHeadModel", "GPT2Config", **GPT2), tokens, 8),
    "gptj": (decoder("GPTJ", **GPTJ), tokens, 12),
    "gpt_neox": (decoder("GPTNeoX", **SIZES), tokens, 8),
    "opt": (decoder("OPT", **OPT), tokens, 12),
    "bloom": (decoder("Bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4), tokens, 8),
    "falcon": (decoder("Falcon", **SMALL, num_attention_heads=4), tokens, 8),
    "olmo2": (decoder("Olmo2", **GROUPED, **SPECIAL), tokens, 14),
    "cohere": (decoder("Cohere", **GROUPED, **SPECIAL), tokens, 14),
    "deepseek_v3": (decoder("DeepseekV3", **DEEPSEEK), tokens, 14),
    "granite": (decoder("Granite", **GROUPED), tokens, 14),
    "smollm3": (decoder("SmolLM3", **GROUPED, **SPECIAL), tokens, 14),
    "stablelm": (decoder("StableLm", **GROUPED), tokens, 14),
    "starcoder2": (decoder("Starcoder2", **GROUPED), tokens, 12),
    "mamba": (decoder("Mamba", **SMALL, state_size=8), tokens, 4),
    "mamba2": (decoder("Mamba2", **MAMBA2), tokens, 4),
    "bert": (encoder("Bert"), tokens, 13),
    "roberta": (encoder("Roberta"), tokens, 12),
    "electra": (encoder("Electra", embedding_size=16), tokens, 14),
    "deberta": (encoder("Deberta", **DEBERTA), tokens, 13),
    "deberta_v2": (encoder("DebertaV2", **DEBERTA), tokens, 13),
    "modernbert": (encoder("ModernBert", **SPECIAL, cls_token_id=1, sep_token_id=2), tokens, 9),
    "t5": (model_of("T5ForConditionalGeneration", "T5Config", **T5), tokens, 32),
    "bart": (
        model_of("BartForConditionalGeneration", "BartConfig", **BART, max_position_embeddings=64),
        tokens,
        16,
    ),
    "whisper": (
        model_of("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
        speech,
        16,
    ),
    "vit": (model_of("ViTForImageClassification", "ViTConfig", **VISION), image, 12),
    "dinov2": (model_of("Dinov2Model", "Dinov2Config", **DINOV2), image, 12),
    "clip": (clip, image_and_text, 26),
    "siglip": (siglip, image_and_text, 27),
    "llava": (llava, image_in_text, 28),
    "timm-like": (VisionNet, image, 3),
}
