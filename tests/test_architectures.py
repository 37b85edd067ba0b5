"""Adapters work on every type of model: default targets, exact at init, alive in every layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, ASKED
from models import state_of, trained
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

import lora_func as lf

# LLaVA reads the features of the last layer but one and ignores the output of the last layer
UNUSED = {"llava": r"vision_tower\.(vision_model\.)?encoder\.layers\.1\."}

pytestmark = [
    pytest.mark.filterwarnings("ignore:the .* adapted layers hold .* in fused experts"),
    # of functional_call on Switch, whose router moves its layer to its dtype in each forward
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def outputs(out) -> list[Tensor]:
    tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    return [t for t in tensors if t.is_floating_point()]


def loss_of(out) -> Tensor:
    """A fixed random projection. The mean square of a normalised output has no gradient."""
    seeded = torch.Generator().manual_seed(0)
    parts = [(t * torch.randn(t.shape, generator=seeded)).sum() for t in outputs(out)]
    return torch.stack(parts).sum()


def everything_holds(
    adapter: lf.Adapter,
    params: dict[str, Tensor],
    model: Any,
    batch: dict[str, Tensor],
    folder: Path,
    *,
    unused: str = "^$",
) -> None:
    """Identity at init, a file, a bound view, every site alive, gradients through merged weights.

    And calls leave the model as it was. `unused` matches targets whose output the model itself
    drops. The model is frozen: attention may take another kernel if one of its biases is not.
    """
    base = outputs(model(**batch))
    # After the first call: transformers leaves hooks when LLaVA records hidden states, and
    # RecurrentGemma and Qwen2-VL write to themselves in each.
    before = state_of(model)
    for given, expected in zip(outputs(adapter(model, params, batch)), base, strict=True):
        assert torch.equal(given, expected)

    start, params = params, trained(params)
    _, grads = lf.value_and_grad(lambda p: loss_of(adapter(model, p, batch)))(params)
    lf.save(folder / "a.safetensors", adapter, params)
    again, same = lf.load(folder / "a.safetensors", model, check_base="error")
    with torch.no_grad():  # which kernels run depends on whether something requires grad
        expected = outputs(adapter(model, params, batch))
        for run in (again(model, same, batch), lf.bind(adapter, model, params)(**batch)):
            found = zip(outputs(run), expected, strict=True)
            assert all(torch.equal(given, t) for given, t in found)
    assert state_of(model) == before

    report = lf.probe(adapter, model, start, batch)
    assert [path for path in report.inert if not re.search(unused, path)] == []
    assert report.base_unchanged
    _, merged = lf.value_and_grad(
        lambda p: loss_of(functional_call(model, lf.merge(adapter, model, p), (), batch))
    )(params)
    assert_gradients(grads, merged)


def assert_gradients(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Leaf by leaf, in float32. Rounding is as large as the largest makes it."""
    assert given.keys() == expected.keys()
    scale = max(leaf.abs().max().item() for leaf in expected.values())
    for key, leaf in expected.items():
        error = (given[key] - leaf).abs().max().item()
        assert error <= 2e-3 * leaf.abs().max().item() + 1e-5 * scale, key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_layers_that_are_adapted_by_default(name, tmp_path):
    case = ARCHITECTURES[name]
    model, batch = case.make().eval().requires_grad_(False), case.batch()
    targets = lf.Targets(exclude=(case.read,) if case.read else ())
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=targets)
    assert len(adapter.targets) == case.layers, adapter.targets
    everything_holds(adapter, params, model, batch, tmp_path, unused=UNUSED.get(name, "^$"))


@pytest.mark.filterwarnings("ignore:.* are one tensor")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter(name, tmp_path):
    """Matrices, stacks of them and kernels by LoRA, all others by Full."""
    case = ARCHITECTURES[name]
    model, batch = case.make().eval().requires_grad_(True), case.batch()
    held = dict(model.named_parameters())
    used = torch.autograd.grad(loss_of(model(**batch)), list(held.values()), allow_unused=True)
    paths = [path for path, grad in zip(held, used) if grad is not None]
    model.requires_grad_(False)
    rules = {f"^{re.escape(path)}$": variant_for(model, path) for path in paths}
    adapter, params = lf.adapt(model, rules)
    assert len(adapter.targets) == len(paths) == case.parameters
    everything_holds(adapter, params, model, batch, tmp_path)


def variant_for(model: nn.Module, path: str) -> lf.Variant:
    """LoRA if a parameter is one matrix, or several."""
    axes = model.get_parameter(path).dim()
    kernel = isinstance(model.get_submodule(path.rpartition(".")[0]), _ConvNd) and axes > 1
    return lf.LoRA(r=2) if axes in (2, 3) or kernel else lf.Full()


@pytest.mark.parametrize("name", ASKED)
def test_what_people_adapt(name, tmp_path):
    """Layers, convolutions, embeddings and parameters in one adapter."""
    case, asked = ARCHITECTURES[name], ASKED[name]
    model, batch = case.make().eval().requires_grad_(False), case.batch()
    adapter, params = lf.adapt(model, {pattern: rule[0] for pattern, rule in asked.items()})
    for pattern, (_, count) in asked.items():
        assert sum(bool(re.search(pattern, path)) for path in adapter.targets) == count, pattern
    assert len(adapter.targets) == sum(count for _, count in asked.values())
    everything_holds(adapter, params, model, batch, tmp_path)


@pytest.mark.parametrize("name", [name for name, case in ARCHITECTURES.items() if case.read])
def test_layers_that_are_read_and_never_called(name):
    case = ARCHITECTURES[name]
    model, batch = case.make().eval().requires_grad_(False), case.batch()
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(names=(str(case.read),)))
    advice = r"reads the weight of '([^']*)'.* Targets\(parameters=\('\1\.weight',\)\)"
    with pytest.raises(lf.LoraFuncError, match=advice):
        adapter(model, params, batch)


def test_the_attention_of_siglips_head():
    """`nn.MultiheadAttention` has a layer that it never calls."""
    model = ARCHITECTURES["siglip"].make()
    with pytest.raises(lf.LoraFuncError, match=r"MultiheadAttention uses its weight.*parameters="):
        lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(names=(r"head\.attention\.out_proj$",)))


def test_whispers_tied_head():
    """Named, it is adapted alone; a merged tensor would be the embedding's too."""
    case = ARCHITECTURES["whisper"]
    model, batch = case.make().eval().requires_grad_(False), case.batch()
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(names=(r"^proj_out$",)))
    assert adapter.targets == ("proj_out",)
    assert lf.probe(adapter, model, params, batch).inert == ()
    with pytest.raises(lf.LoraFuncError, match="proj_out"):
        lf.merge(adapter, model, params)
    with pytest.warns(UserWarning, match="one tensor"):
        adapter, params = lf.adapt(
            model, lf.LoRA(r=2), targets=lf.Targets(names=(r"proj_out$", r"embed_tokens$"))
        )
    assert adapter.targets == ("model.decoder.embed_tokens",)
    assert lf.probe(adapter, model, params, batch).inert == ()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_transformer_encoder(norm_first, grad):
    """The fused path of PyTorch's own encoder (eval, no gradients) skips its linear layers."""
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    layer = nn.TransformerEncoderLayer(32, 4, 48, **options)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 32)
    adapter, params = lf.adapt(model, lf.LoRA(r=2))
    assert {path.rsplit(".", 1)[-1] for path in adapter.targets} == {"linear1", "linear2"}
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(adapter(model, params, x), model(x))
        moved = trained(params)
        expected = functional_call(model, lf.merge(adapter, model, moved), (x,))
        torch.testing.assert_close(adapter(model, moved, x), expected)
        assert (adapter(model, moved, x) - model(x)).abs().max() > 1e-3
