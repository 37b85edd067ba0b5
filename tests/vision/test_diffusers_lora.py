"""A plain LoRA in a file, as diffusers reads it: by its tensors alone, with a scale of 1."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from models import trained
from safetensors.torch import save_file

import lora_func as lf


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    ).eval()


def test_a_file_of_plain_lora(tmp_path):
    """Of any ranks, under PEFT's keys."""
    model, other = unet(), unet()
    other.load_state_dict(model.state_dict())
    rules = {r"to_(q|k)$": lf.PiSSA(r=2), r"to_v$": lf.LoRA(r=3), r"to_out": lf.HRA(r=2)}
    targets = lf.Targets(names=(r"\.to_(q|k|v|out\.0)$",), roles=())
    adapter, params = lf.adapt(model, rules, targets=targets)
    params = trained(params)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 5]), torch.randn(2, 5, 8)
    expected = adapter(model, params, inputs).sample
    plain, leaves = lf.as_lora(adapter, params, model=model)
    keys = {path: f"base_model.model.{path}.lora" for path in plain.targets}
    tensors = {f"{keys[p]}_{n}.weight": leaves[f"{p}.lora_{n}"] for p in keys for n in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    name = {"weight_name": "adapter_model.safetensors", "prefix": "base_model.model"}
    other.load_lora_adapter(tmp_path, **name)
    torch.testing.assert_close(other(*inputs).sample, expected)
    assert (model(*inputs).sample - expected).abs().max() > 1e-2
