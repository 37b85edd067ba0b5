"""Layers that are adapted and never run: the call says so."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, SIZES, Fields
from models import adapted, text_batch, trained
from torch import nn
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
    WavLMConfig,
    WavLMModel,
)

import lora_func as lf

EVERYTHING = lf.Targets(roles=())


class ReadsItsWeight(nn.Module):
    """As timm's BEiT, EVA-02 and torchvision's Swin do with `qkv`."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return self.proj(q * k.sigmoid() + v)


class Fused(nn.Module):
    """As diffusers' attention after `fuse_projections`."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.to_qkv = nn.Linear(8, 8)
        self.fused = True

    def forward(self, x):
        return self.to_out(self.to_qkv(x) if self.fused else self.to_q(x))


class Experts(nn.Module):
    """Routes to one of a list of layers."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in "1234")

    def forward(self, x):
        return self.experts[int(self.router(x).sum(0).argmax())](x)


def wavlm():
    sizes: Fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    convolutions: Fields = {"conv_dim": (16,), "conv_stride": (4,), "conv_kernel": (8,)}
    positions: Fields = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    config = WavLMConfig(intermediate_size=48, **sizes, **convolutions, **positions)
    return WavLMModel(config).eval(), {"input_values": torch.randn(2, 400)}, ("q_proj",)


def mamba():
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    return MambaForCausalLM(config).eval(), {"input_ids": text_batch()["input_ids"]}, ("dt_proj",)


@pytest.mark.parametrize("bound", [False, True], ids=["call", "bound"])
@pytest.mark.parametrize("make", [wavlm, mamba])
def test_models_that_read_a_weight(make, bound):
    """PEFT's adapters are as dead there, and nothing says so."""
    model, batch, names = make()
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(names=names))
    with pytest.raises(
        lf.LoraFuncError,
        match=rf"reads the weight of '.*{names[0]}' and never calls .*parameters=\('.*\.weight'",
    ):
        lf.bind(adapter, model, params)(**batch) if bound else adapter(model, params, batch)


def test_a_weight_that_is_read_among_layers_that_are_called():
    model = ReadsItsWeight()
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=EVERYTHING)
    with pytest.raises(lf.LoraFuncError, match=r"ReadsItsWeight '' reads the weight of 'qkv'"):
        adapter(model, params, torch.randn(3, 8))
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(exclude=("qkv",), roles=()))
    adapter(model, params, torch.randn(3, 8))


@pytest.mark.parametrize("bound", [False, True], ids=["call", "bound"])
def test_layers_that_their_parent_passes_over(bound):
    """A warning, once: the parent may use them for other inputs."""
    model, x = Fused(), torch.randn(3, 8)
    targets = lf.Targets(exclude=("to_qkv",), roles=())
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=targets)
    view = lf.bind(adapter, model, params) if bound else lambda x: adapter(model, params, x)
    with pytest.warns(UserWarning, match="not called while its parent ran: 'to_q'"):
        view(x)
    view(x)


def test_a_model_that_calls_no_adapted_layer():
    model = Fused()
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(names=("to_q$",)))
    with pytest.raises(lf.LoraFuncError, match="called none of the adapted layers, 'to_q'"):
        adapter(model, params, torch.randn(3, 8))


def test_a_head_that_is_left_aside():
    """MobileBERT concatenates the weight of its head with the embeddings."""
    sizes: Fields = {
        **SIZES,
        "num_hidden_layers": 1,
        "embedding_size": 16,
        "true_hidden_size": 16,
        "intra_bottleneck_size": 16,
    }
    config = MobileBertConfig(**sizes)
    model = MobileBertForMaskedLM(config).eval()
    adapter, params = lf.adapt(
        model, {r"predictions\.dense$": lf.LoRA(r=2), r"query$": lf.LoRA(r=2)}
    )
    with pytest.raises(lf.LoraFuncError, match=r"reads the weight of 'cls\.predictions\.dense'"):
        adapter(model, params, {"input_ids": text_batch()["input_ids"]})


def test_an_expert_without_tokens_is_no_error():
    model = nn.Sequential(Experts(), Experts())
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=EVERYTHING)
    assert len(adapter.targets) == 10
    for _ in range(3):
        adapter(model, params, torch.randn(3, 8))


def test_cached_keys_of_an_encoder_are_no_error():
    """After the first token a decoder calls no k and v on the encoder's states."""
    model = ARCHITECTURES["t5"][0]().eval().requires_grad_(False)
    adapter, params = lf.adapt(model, lf.LoRA(r=2))
    bound = lf.bind(adapter, model, trained(params))
    tokens = bound.generate(text_batch()["input_ids"], max_new_tokens=5, do_sample=False)
    assert tokens.shape[1] > 2


def test_a_batch_that_reaches_other_layers():
    """As text alone in a model with a vision tower. Once is enough of a warning."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.image = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))

        def forward(self, text, image=None):
            return self.text(text) if image is None else self.text(text) + self.image(image)

    model, x = Two(), torch.randn(3, 8)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(names=("image",)))
    with pytest.warns(UserWarning, match="Two ran, but none of the adapted layers"):
        adapter(model, params, (x,))
    adapter(model, params, (x,))
    adapter(model, params, (x, x))


def test_parents_are_watched_until_all_layers_have_run():
    """Then a call costs no hook."""
    model, adapter, params = adapted()
    bound = lf.bind(adapter, model, params)

    def hooks():
        inner = (module for module in bound.modules() if module is not bound)
        return sum(len(module._forward_pre_hooks) for module in inner)

    assert hooks() == 2  # the attention of each layer
    bound(**text_batch())
    assert hooks() == 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_in_threads():
    """Eight threads, one adapter: each knows what its own call reached."""
    model, errors = ReadsItsWeight(), []
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=EVERYTHING)

    def run():
        try:
            adapter(model, params, torch.randn(3, 8))
        except lf.LoraFuncError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(errors) == 8


def test_under_compile_nothing_is_watched():
    model, adapter, params = adapted()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda p, ids: adapter(model, p, {"input_ids": ids}).logits,
        fullgraph=True,
        backend="eager",
    )
    ids = text_batch()["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = compiled(params, ids)
    assert torch.equal(out, adapter(model, params, {"input_ids": ids}).logits)
