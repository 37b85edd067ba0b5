"""Tiny random models of timm, open_clip and diffusers, with a batch and what to adapt for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import open_clip
import timm
import torch
from torch import Tensor

Batch = dict[str, Tensor]
Sizes = dict[str, Any]
Patterns = dict[str, int]  # regex -> number of layers or parameters that it names


class Case(NamedTuple):
    """A model, and how many layers and parameters patterns name in it."""

    make: Callable[[], Any]
    batch: Callable[[], Batch]
    layers: Patterns  # linear layers that the model calls
    parameters: Patterns  # others: of convolutions, attention and embeddings, weights that it reads


# timm. The depths differ from stage to stage, so no count is right by accident.


def vit() -> Any:
    sizes: Sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)


def beit() -> Any:
    sizes: Sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm.create_model("beit_base_patch16_224", num_classes=5, init_values=0.5, **sizes)


def convnext() -> Any:
    sizes: Sizes = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    return timm.create_model("convnext_tiny", num_classes=5, ls_init_value=0.5, **sizes)


def windows(name: str) -> Any:
    sizes: Sizes = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1)}
    return timm.create_model(name, num_classes=5, num_heads=(2, 4), **sizes)


def swin() -> Any:
    return windows("swin_tiny_patch4_window7_224")


def swinv2() -> Any:
    """Fresh, its blocks have no effect: they end in a norm that scales by 0."""
    model = windows("swinv2_tiny_window8_256")
    for path, module in model.named_modules():
        if path.endswith(("norm1", "norm2")):
            torch.nn.init.ones_(module.weight)
    return model


def images(size: int) -> Callable[[], Batch]:
    return lambda: {"x": torch.randn(2, 3, size, size)}


# open_clip


def clip() -> Any:
    """Both towers. Their attention is torch's nn.MultiheadAttention."""
    vision = open_clip.CLIPVisionCfg(image_size=16, patch_size=8, width=32, layers=2, head_width=8)
    text = open_clip.CLIPTextCfg(context_length=7, vocab_size=64, width=32, heads=4, layers=3)
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


def image_and_text() -> Batch:
    return {"image": torch.randn(2, 3, 16, 16), "text": torch.randint(1, 64, (2, 7))}


# diffusers


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=4,
    )


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


def sd3(**changes: Any) -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        **changes,
    )


def sd35() -> Any:
    """As Stable Diffusion 3.5 Medium: norms of q and k, and a second attention in some blocks."""
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def fused(make: Callable[[], Any]) -> Callable[[], Any]:
    """A model with one layer for q, k and v, as diffusers makes it for faster inference."""

    def made() -> Any:
        model = make()
        model.fuse_qkv_projections()
        return model

    return made


def noisy_image() -> Batch:
    states, steps = torch.randn(2, 5, 24), torch.tensor([3, 7])
    return {"sample": torch.randn(2, 4, 8, 8), "timestep": steps, "encoder_hidden_states": states}


def noisy_latents() -> Batch:
    rows, cols = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor([0.3, 0.7]),
        "guidance": torch.tensor([3.5, 2.0]),
        "img_ids": torch.stack([torch.zeros(4, 4), rows, cols], dim=-1).reshape(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def noisy_image_and_pooled_text() -> Batch:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor([3, 7]),
    }


VIT_BLOCK = {r"attn\.proj$": 2, r"mlp\.fc[12]$": 4}
SWIN_BLOCK = {r"attn\.proj$": 3, r"mlp\.fc[12]$": 6, r"downsample\.reduction$": 1, r"head\.fc$": 1}
UNET_CONVOLUTIONS = {
    r"conv_(in|out)\.weight$": 2,
    r"resnets\.\d\.conv[12]\.weight$": 16,
    r"conv_shortcut\.weight$": 5,
    r"samplers\.0\.conv\.weight$": 2,
    r"attentions\.\d\.proj_(in|out)\.weight$": 8,
}
# As the training scripts of diffusers name them, and those for convolutions beside.
TRAINED_UNET = {
    r"to_(k|q|v|out\.0)$": 32,
    r"proj_(in|out)$": 8,
    r"ff\.net\.(0\.proj|2)$": 8,
    r"time_emb_proj$": 8,
    r"\.conv[12]$": 16,
    r"conv_shortcut$": 5,
    r"samplers\.0\.conv$": 2,
    r"^conv_(in|out)$": 2,
}

CASES = {
    "vit": Case(
        vit,
        images(16),
        {r"attn\.qkv$": 2, **VIT_BLOCK, r"^head$": 1},
        {r"patch_embed\.proj\.weight$": 1},
    ),
    "beit": Case(
        beit,
        images(16),
        {**VIT_BLOCK, r"^head$": 1},
        {
            r"attn\.qkv\.weight$": 2,
            r"patch_embed\.proj\.weight$": 1,
            r"relative_position_bias_table$": 2,
        },
    ),
    "convnext": Case(
        convnext,
        images(32),
        {r"mlp\.fc[12]$": 10, r"head\.fc$": 1},
        {r"^stem\.0\.weight$": 1, r"conv_dw\.weight$": 5, r"downsample\.1\.weight$": 3},
    ),
    "swin": Case(
        swin,
        images(32),
        {r"attn\.qkv$": 3, **SWIN_BLOCK},
        {r"patch_embed\.proj\.weight$": 1, r"relative_position_bias_table$": 3},
    ),
    "swinv2": Case(
        swinv2,
        images(32),
        {r"cpb_mlp\.[02]$": 6, **SWIN_BLOCK},
        {r"attn\.qkv\.weight$": 3, r"patch_embed\.proj\.weight$": 1},
    ),
    "open_clip": Case(
        clip,
        image_and_text,
        {r"^visual.*mlp\.c_(fc|proj)$": 4, r"^transformer.*mlp\.c_(fc|proj)$": 6},
        {
            r"in_proj_weight$": 5,
            r"out_proj\.weight$": 5,
            r"^visual\.conv1\.weight$": 1,
            r"^token_embedding\.weight$": 1,
            r"positional_embedding$": 2,
            r"^visual\.proj$": 1,
            r"^text_projection$": 1,
        },
    ),
    "unet": Case(
        unet,
        noisy_image,
        {
            r"attn1\.to_(q|k|v|out\.0)$": 16,
            r"attn2\.to_(q|k|v|out\.0)$": 16,
            r"ff\.net\.(0\.proj|2)$": 8,
            r"time_emb": 10,
        },
        UNET_CONVOLUTIONS,
    ),
    "fused_unet": Case(
        fused(unet),
        noisy_image,
        {r"attn1\.to_(qkv|out\.0)$": 8, r"attn2\.to_(q|out\.0)$": 8},
        {r"attn2\.to_kv\.weight$": 4},
    ),
    "flux": Case(
        flux,
        noisy_latents,
        {
            r"to_[qk]$": 6,
            r"(add_[qkv]_proj|to_add_out|to_out\.0)$": 5,
            r"net\.(0\.proj|2)$": 4,
            r"single.*proj_(mlp|out)$": 4,
            r"norm.*\.linear$": 5,
            r"time_text_embed": 6,
        },
        {r"to_v\.weight$": 3, r"^(x|context)_embedder\.weight$": 2},
    ),
    "fused_flux": Case(
        fused(flux),
        noisy_latents,
        {r"to_qkv$": 3},
        {r"to_added_qkv\.weight$": 1},
    ),
    "sd3": Case(
        sd3,
        noisy_image_and_pooled_text,
        {
            r"to_[qkv]$": 6,
            r"(add_[qkv]_proj|to_add_out|to_out\.0)$": 9,
            r"net\.(0\.proj|2)$": 6,
            r"norm.*\.linear$": 5,
            r"^proj_out$": 1,
        },
        {r"pos_embed\.proj\.weight$": 1},
    ),
    "sd35": Case(
        sd35,
        noisy_image_and_pooled_text,
        {r"attn\.to_[qkv]$": 6, r"attn2\.to_(q|k|v|out\.0)$": 4, r"attn\.add_[qkv]_proj$": 6},
        {r"pos_embed\.proj\.weight$": 1},
    ),
    "fused_sd3": Case(
        fused(sd3),
        noisy_image_and_pooled_text,
        {r"to_qkv$": 2},
        {r"to_added_qkv\.weight$": 2},
    ),
}
