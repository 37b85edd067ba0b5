"""What `reach` counts and says, against the model itself."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from models import tiny_llama
from torch import nn

import lora_func as lf


def test_shares_are_those_of_the_parameters():
    model = ARCHITECTURES["mixtral"][0]()
    targets = lf.Targets(names=(r"self_attn\.\w_proj$",), parameters=(r"experts",))
    found = lf.reach(model, targets)
    named = {
        path: parameter.numel()
        for path, parameter in model.named_parameters()
        if "experts" in path or "self_attn" in path
    }
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert (found.targets, found.reached) == (len(named), sum(named.values()))
    parts = [*found.adapted, *found.left_out]
    assert sum(part.parameters for part in parts) == found.parameters
    assert found.share == found.reached / found.parameters


def test_it_says_what_is_left_out_and_why():
    text = str(lf.reach(ARCHITECTURES["mixtral"][0]()))
    assert "left out      2 x model.layers.N.mlp.experts.gate_up_proj" in text
    for reason in ("a stack: name the parameter", "an embedding: name it", "a head: name it"):
        assert reason in text
    text = str(lf.reach(tiny_llama(), lf.Targets(names=("q_proj",), layers=[0], exclude=("mlp",))))
    for reason in ("not named", "in another block", "excluded"):
        assert reason in text
    assert "no matrix: lf.Full() takes it" in str(lf.reach(tiny_llama()))


def test_of_an_adapter_it_counts_what_trains():
    model = tiny_llama()
    adapter, params = lf.adapt(model, {"q_proj": lf.LoRA(r=2), r"norm\.weight": lf.Full()})
    found = lf.reach(model, adapter)
    trainable = sum(leaf.numel() for leaf in params.values())
    assert (found.targets, found.trainable) == (len(adapter.targets), trainable)
    assert f"trainable: {trainable:,} (" in str(found)
    assert {part.path for part in found.adapted} >= {"model.norm.weight"}


def test_a_model_without_data():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 4, 2), nn.Linear(4, 2))
    found = lf.reach(model)
    assert (found.targets, found.reached) == (2, 24)
    assert "a convolution: name it" in str(found)


def test_wrong_targets():
    with pytest.raises(lf.LoraFuncError, match="targets must be a Targets or an Adapter, not 'q'"):
        lf.reach(tiny_llama(), "q")  # pyright: ignore
