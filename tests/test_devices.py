"""Bases with layers on several devices, and offloaded ones, as accelerate makes them.

Here layers compute on the CPU. Offloaded weights are on the meta device between forwards, as they
are beside a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    attach_align_device_hook,
)
from models import text_batch, tiny_llama, trained
from torch import nn

import lora_func as lf
from lora_func.probing import state_hash
from lora_func.weights.layer import whole

CPU = torch.device("cpu")
MAP: dict[str, str | int | torch.device] = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "lm_head": "disk",
}
OFFLOADED = {
    "cpu": lambda model, folder: cpu_offload(model, CPU),
    "disk": lambda model, folder: disk_offload(model, folder, CPU),
    "map": lambda model, folder: dispatch_model(model, MAP, offload_dir=folder),
}
VARIANTS = [
    lf.LoRA(r=4),
    lf.DoRA(r=4),
    lf.PiSSA(r=4),
    lf.DeLoRA(r=4),
    lf.HRA(r=4),
    lf.IA3(),
    lf.IA3FF(),
]


@pytest.fixture(params=OFFLOADED)
def offload(request, tmp_path):
    return lambda model: OFFLOADED[request.param](model, tmp_path / "offloaded")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(a, b) -> bool:
    if a.keys() != b.keys():
        return False
    return all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6) for key in a)


@pytest.mark.parametrize(
    ("variant", "frozen"),
    [*((variant, True) for variant in VARIANTS), (lf.DoRA(r=4), False)],
    ids=str,
)
def test_an_offloaded_base_is_the_base(variant, frozen, offload, tmp_path):
    """Offloading changes no parameter, constant, fingerprint, merged weight or file by a bit.

    Nor outputs and gradients, but for rounding: the hook of an offloaded layer keeps it apart from
    its update, with which a plain layer is fused. All results are on the CPU.
    """
    model, batch = tiny_llama(attention_bias=True).requires_grad_(not frozen), text_batch()

    def everything(model):
        adapter, params = lf.adapt(model, variant, generator=seeded())
        moved = {key: leaf + 0.1 for key, leaf in params.items()}
        loss, grads = lf.value_and_grad(lambda p: adapter(model, p, batch).loss)(moved)
        merged = lf.merge(adapter, model, moved)
        return adapter.base, [params, dict(adapter.frozen), {"loss": loss}, grads, merged]

    base, expected = everything(model)
    lf.save(tmp_path / "adapter.safetensors", *lf.adapt(model, variant, generator=seeded()))
    held = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model = offload(model)
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    base_there, given = everything(model)
    assert base_there == base
    computed = (2, 3)  # loss and gradients
    for i, (a, b) in enumerate(zip(given, expected, strict=True)):
        assert close(a, b) if i in computed else same(a, b)
    _, loaded = lf.load(tmp_path / "adapter.safetensors", model, check_base="error")
    assert same(loaded, expected[0])
    for name, tensor in held.items():
        path, _, leaf = name.rpartition(".")
        assert torch.equal(whole(model.get_submodule(path), leaf), tensor)
        assert model.get_parameter(name).requires_grad is not frozen
        assert model.get_parameter(name).grad is None


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_transforms(where, tmp_path):
    """torch.func.grad runs through hooks.

    It cannot run through layers that dispatch_model offloads to the disk; the error names a way
    that can.
    """
    model, batch = tiny_llama().requires_grad_(False), text_batch()
    adapter, params = lf.adapt(model, lf.DoRA(r=4))
    params = trained(params)
    grad = torch.func.grad(lambda p: adapter(model, p, batch).loss)
    want = grad(params)
    model = OFFLOADED[where](model, tmp_path)
    assert close(grad(params), want)  # an offloaded layer prepares alone, and others together
    model = OFFLOADED["map"](tiny_llama().requires_grad_(False), tmp_path / "map")
    with pytest.raises(lf.LoraFuncError, match=r"offloads to the disk[.] Use lf"):
        grad(params)


def test_a_bound_view_keeps_what_it_prepared(tmp_path):
    """Without gradients, of layers whose weights come and go."""
    model, batch = tiny_llama().requires_grad_(False), text_batch()
    adapter, params = lf.adapt(model, CountingHRA(r=2))
    view = lf.bind(adapter, OFFLOADED["cpu"](model, tmp_path), params).eval()
    CountingHRA.count.clear()
    with torch.no_grad():
        for _ in range(3):
            view(**batch)
    assert len(CountingHRA.count) == len(adapter.targets)


@dataclass(frozen=True, kw_only=True)
class CountingHRA(lf.HRA):
    """HRA that counts how often it is prepared."""

    count: ClassVar[list[torch.dtype]] = []

    def prepare(self, weight, params, dtype):
        self.count.append(dtype)
        return super().prepare(weight, params, dtype)


# transformers warns so on a machine with a GPU.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
def test_generate_and_probe(offload):
    """A bound view of an offloaded model generates, and the probe finds its base unchanged."""
    model, batch = tiny_llama(), text_batch()
    adapter, params = lf.adapt(model, lf.DoRA(r=4))
    params = trained(params)
    ids = {"input_ids": batch["input_ids"][:, :4], "max_new_tokens": 3, "do_sample": False}
    want = lf.bind(adapter, model, params).generate(**ids)
    model = offload(model)
    assert torch.equal(lf.bind(adapter, model, params).generate(**ids), want)
    found = lf.probe(adapter, model, params, batch)
    assert found.base_unchanged
    assert not found.inert


def test_probe_sees_a_change_of_offloaded_weights():
    """Its hash covers the weights that the hooks hold, not the empty tensors in the model."""
    model = tiny_llama()
    cpu_offload(model, CPU)
    before = state_hash(model)
    model.model.layers[0].self_attn.q_proj._hf_hook.weights_map["weight"][0, 0] += 1
    assert state_hash(model) != before


def test_a_chain_of_hooks():
    """With `append=True` accelerate chains hooks, and any of them may hold the weights."""
    model, batch = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)), torch.randn(2, 6)
    adapter, params = lf.adapt(model, lf.DoRA(r=2))
    params = trained(params)
    want = adapter(model, params, batch)
    cpu_offload(model, CPU)
    for layer in model:
        add_hook_to_module(layer, ModelHook(), append=True)
    assert torch.equal(adapter(model, params, batch), want)
    assert lf.adapt(model, lf.DoRA(r=2))[0].base == adapter.base


@dataclass(frozen=True, kw_only=True)
class SameDevice(lf.Variant):
    """Asserts that input, output, weight and parameters are on one device."""

    def init(self, weight, generator, stats=None):
        return lf.Params(trainable={"s": torch.zeros(())})

    def apply(self, x, base_out, weight, params):
        assert x.device == base_out.device == weight.device == params["s"].device
        return base_out + x.sum() * params["s"]


def test_the_input_comes_from_another_device():
    """A layer's hook moves its input. The adapter sees the input earlier, and must move it, too."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    add_hook_to_module(model[1], AlignDevicesHook("meta"))
    adapter, params = lf.adapt(model, SameDevice())
    assert [leaf.device.type for leaf in params.values()] == ["cpu", "meta"]
    assert adapter(model, params, torch.randn(2, 6)).is_meta
    each = lf.expand(params, 2)
    assert adapter(model, each, torch.randn(2, 6)).is_meta


def test_a_block_that_is_offloaded_as_a_whole():
    """Its hook knows the layers inside by names that the view changes, so the block is refused."""
    model = tiny_llama().requires_grad_(False)
    adapter, _ = lf.adapt(model, lf.LoRA())
    weights = dict(model.state_dict())
    blocks = ["LlamaAttention"]
    attach_align_device_hook(
        model, CPU, offload=True, weights_map=weights, preload_module_classes=blocks
    )
    message = r"LlamaAttention '(\S+)' as a whole, with '\1.q_proj'.* without preload"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(model, lf.LoRA())
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter.init(model)
    adapter, params = lf.adapt(model, lf.LoRA(r=4), targets=lf.Targets(names=(r"mlp\.",)))
    assert adapter(model, params, text_batch()).loss.isfinite()
