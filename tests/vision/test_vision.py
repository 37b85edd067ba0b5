"""Adapters on models of timm, open_clip and diffusers: what they call, and what they read."""

from __future__ import annotations

import re

import pytest
import torch
from models import trained
from test_architectures import everything_holds, outputs
from torch.func import functional_call
from zoo import CASES, TRAINED_UNET, Patterns, image_and_text

import lora_func as lf

# The last block of SD3 computes the text's queries and drops what it attends to with them.
UNUSED = dict.fromkeys(("sd3", "sd35"), r"transformer_blocks\.1\.attn\.add_q_proj$")


@pytest.fixture
def plain_attention():
    """nn.MultiheadAttention takes a fused kernel, which rounds otherwise, if all is frozen.

    An adapter on its weights takes the plain one.
    """
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", CASES)
def test_layers_that_the_model_calls(name, tmp_path):
    case = CASES[name]
    model, batch = case.make().eval().requires_grad_(False), case.batch()
    adapter, params = lf.adapt(model, lf.LoRA(r=4), targets=lf.Targets(names=tuple(case.layers)))
    assert found(adapter, case.layers) == case.layers
    everything_holds(adapter, params, model, batch, tmp_path, unused=UNUSED.get(name, "^$"))


@pytest.mark.usefixtures("plain_attention")
@pytest.mark.parametrize("name", CASES)
def test_parameters_that_the_model_reads(name, tmp_path):
    case = CASES[name]
    model, batch = case.make().eval().requires_grad_(False), case.batch()
    targets = lf.Targets(parameters=tuple(case.parameters))
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=targets)
    assert found(adapter, case.parameters) == case.parameters
    everything_holds(adapter, params, model, batch, tmp_path)


@pytest.mark.usefixtures("plain_attention")
@pytest.mark.parametrize("name", CASES)
def test_both_at_once(name, tmp_path):
    case = CASES[name]
    model, batch = case.make().eval().requires_grad_(False), case.batch()
    rules = dict.fromkeys(case.layers, lf.LoRA(r=4)) | dict.fromkeys(case.parameters, lf.LoRA(r=2))
    adapter, params = lf.adapt(model, rules)
    assert found(adapter, case.layers | case.parameters) == case.layers | case.parameters
    everything_holds(adapter, params, model, batch, tmp_path, unused=UNUSED.get(name, "^$"))


@pytest.mark.parametrize("name", ["convnext", "unet", "open_clip"])
def test_convolutions_and_embeddings_by_name(name, tmp_path):
    """They are layers, too, and keep their own path."""
    case = CASES[name]
    model, batch = case.make().eval().requires_grad_(False), case.batch()
    kinds = (torch.nn.Conv2d, torch.nn.Embedding)
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    names = tuple(f"^{re.escape(path)}$" for path in paths)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(names=names))
    assert list(adapter.targets) == paths
    everything_holds(adapter, params, model, batch, tmp_path)


def test_a_unet_as_people_train_it(tmp_path):
    """LoRA on attention and on convolutions at once, all named as layers."""
    model, batch = CASES["unet"].make().eval().requires_grad_(False), CASES["unet"].batch()
    targets = lf.Targets(names=tuple(TRAINED_UNET))
    adapter, params = lf.adapt(model, lf.LoRA(r=4), targets=targets)
    assert found(adapter, TRAINED_UNET) == TRAINED_UNET
    everything_holds(adapter, params, model, batch, tmp_path)


@pytest.mark.parametrize("name", ["vit", "convnext", "unet", "flux", "fused_flux", "sd3"])
def test_each_image_through_its_own_adapter(name):
    """Layers and parameters, with an example axis, equal one image after the other."""
    case = CASES[name]
    model, batch = case.make().eval().requires_grad_(False), case.batch()
    adapter, params = lf.adapt(model, dict.fromkeys(case.layers | case.parameters, lf.LoRA(r=2)))
    several = [trained(params) for _ in range(2)]
    together = outputs(adapter(model, lf.stack(several), batch))[0]
    for i, one in enumerate(several):
        rows = {key: t[i : i + 1] if len(t) == 2 else t for key, t in batch.items()}
        alone = outputs(adapter(model, one, rows))[0]
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=1e-5)  # float32


def test_beside_the_fused_attention_of_torch():
    model, batch = CASES["open_clip"].make().eval().requires_grad_(False), image_and_text()
    targets = lf.Targets(parameters=(r"in_proj_weight$", r"out_proj\.weight$"))
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=targets)
    moved = trained(params)
    merged = functional_call(model, lf.merge(adapter, model, moved), (), batch)
    for given, expected in ((params, model(**batch)), (moved, merged)):
        # float32, two kernels
        torch.testing.assert_close(adapter(model, given, batch), expected, atol=1e-5, rtol=1e-5)


def found(adapter: lf.Adapter, patterns: Patterns) -> Patterns:
    """How many of an adapter's targets each pattern names. Each target must have its pattern."""
    counts = {p: sum(bool(re.search(p, path)) for path in adapter.targets) for p in patterns}
    assert sum(counts.values()) == len(adapter.targets)
    return counts
