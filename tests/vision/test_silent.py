"""Layers that these libraries pass over: a call with an adapter there raises or warns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import trained
from test_architectures import outputs
from zoo import CASES

import lora_func as lf

APART = lf.Targets(names=(r"to_[qkv]$",))
FUSED = lf.Targets(names=(r"to_q?kv$",))


def of(name: str, targets: lf.Targets) -> tuple[Any, lf.Adapter, dict[str, torch.Tensor], Any]:
    """A model, an adapter of it with parameters as if trained, and a batch."""
    case = CASES[name]
    model = case.make().eval().requires_grad_(False)
    adapter, params = lf.adapt(model, lf.LoRA(r=4), targets=targets)
    return model, adapter, trained(params), case.batch()


def says_so(name: str) -> Any:
    """What a call does once q, k and v are fused. A UNet still calls `to_q` on text."""
    if name == "unet":
        return pytest.warns(UserWarning, match=r"not called while its parent ran: '.*attn1\.to_q'")
    return pytest.raises(lf.LoraFuncError, match=r"called none of the adapted layers, '.*to_q'")


@pytest.mark.parametrize("bound", [False, True], ids=["call", "bound"])
@pytest.mark.parametrize("name", ["unet", "flux", "sd3"])
def test_separate_layers_of_a_fused_model(name, bound):
    model, adapter, params, batch = of(f"fused_{name}", APART)
    with says_so(name):
        lf.bind(adapter, model, params)(**batch) if bound else adapter(model, params, batch)


@pytest.mark.parametrize("name", ["unet", "flux", "sd3"])
def test_fused_after_adapt(name):
    model, adapter, params, batch = of(name, APART)
    model.fuse_qkv_projections()
    with says_so(name):
        adapter(model, params, batch)


@pytest.mark.parametrize("bound", [False, True], ids=["call", "bound"])
@pytest.mark.parametrize("name", ["unet", "flux", "sd3"])
def test_fused_after_a_call(name, bound):
    model, adapter, params, batch = of(name, APART)
    adapter(model, params, batch)
    model.fuse_qkv_projections()
    with says_so(name):
        lf.bind(adapter, model, params)(**batch) if bound else adapter(model, params, batch)


@pytest.mark.parametrize("name", ["unet", "flux", "sd3"])
def test_a_bound_view_fused_after_a_call(name):
    """The view has modules of its own: the model stays apart, and its layers too."""
    model, adapter, params, batch = of(name, APART)
    view = lf.bind(adapter, model, params)
    view(**batch)
    view.fuse_qkv_projections()
    with says_so(name):
        view(**batch)
    assert not any("qkv" in path for path, _ in model.named_modules())


@pytest.mark.parametrize("name", ["unet", "flux", "sd3"])
def test_a_bound_view_keeps_its_adapter_when_the_model_is_fused(name):
    model, adapter, params, batch = of(name, APART)
    view = lf.bind(adapter, model, params)
    expected = outputs(view(**batch))
    model.fuse_qkv_projections()
    assert all(torch.equal(a, b) for a, b in zip(outputs(view(**batch)), expected))


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", ["unet", "flux", "sd3"])
def test_a_fused_layer_of_a_model_that_is_apart_again(name, called):
    """Flux removes the fused layer, the others pass it over."""
    model, adapter, params, batch = of(f"fused_{name}", FUSED)
    if called:
        adapter(model, params, batch)
    model.unfuse_qkv_projections()
    with pytest.raises(lf.LoraFuncError, match=r"has no layer .*qkv|called none of the adapted"):
        adapter(model, params, batch)


@pytest.mark.parametrize("bound", [False, True], ids=["call", "bound"])
@pytest.mark.parametrize("name", ["unet", "flux", "sd3"])
def test_a_parameter_that_a_fused_model_leaves_aside(name, bound):
    targets = lf.Targets(parameters=(r"to_[qkv]\.weight$",))
    model, adapter, params, batch = of(f"fused_{name}", targets)
    with pytest.raises((lf.LoraFuncError, UserWarning), match=r"to_q\.weight"):
        lf.bind(adapter, model, params)(**batch) if bound else adapter(model, params, batch)


@pytest.mark.parametrize("name", ["beit", "swinv2"])
def test_a_layer_whose_weight_is_read(name):
    """timm adds a bias of its own to the product with the weight of `qkv`."""
    model, adapter, params, batch = of(name, lf.Targets())
    assert any(path.endswith("attn.qkv") for path in adapter.targets)
    advice = r"reads the weight of '([^']*)'.* Targets\(parameters=\('\1\.weight',\)\)"
    with pytest.raises(lf.LoraFuncError, match=advice):
        adapter(model, params, batch)
