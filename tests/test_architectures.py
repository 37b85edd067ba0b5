"""Adapters work on every type of model: default targets, exact at init, alive in every layer."""

from __future__ import annotations

import re

import pytest
import torch
from architectures import ARCHITECTURES
from models import largest, state_of, trained
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import lora_func as lf

# LLaVA reads the features of the last layer but one and ignores the output of the last layer
UNUSED = {"llava": r"vision_tower\.(vision_model\.)?encoder\.layers\.1\."}


def outputs(out) -> list[torch.Tensor]:
    tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    return [t for t in tensors if t.is_floating_point()]


def loss_of(out) -> torch.Tensor:
    """A fixed random projection. The mean square of a normalised output has no gradient."""
    seeded = torch.Generator().manual_seed(0)
    parts = [(t * torch.randn(t.shape, generator=seeded)).sum() for t in outputs(out)]
    return torch.stack(parts).sum()


@pytest.mark.filterwarnings("ignore:the .* adapted layers hold .* in fused experts")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name, tmp_path):
    """Everything an adapter does on one type of model, which stays unchanged.

    Covers targets, identity at init, liveness, gradients against merged weights, a bound view
    and a file.
    """
    make, make_batch, count = ARCHITECTURES[name]
    # frozen: the choice of attention kernel depends on whether a bias of the model requires grad
    model, batch = make().eval().requires_grad_(False), make_batch()
    base = outputs(model(**batch))
    # after the first call: transformers itself leaves hooks when LLaVA records hidden states
    before = state_of(model)
    adapter, params = lf.adapt(model, lf.LoRA(r=2))
    assert len(adapter.targets) == count, adapter.targets
    for given, expected in zip(outputs(adapter(model, params, batch)), base, strict=True):
        assert torch.equal(given, expected)

    report = lf.probe(adapter, model, params, batch)
    alive = [path for path in report.inert if not re.search(UNUSED.get(name, r"^$"), path)]
    assert alive == []
    assert report.base_unchanged

    params = trained(params)
    _, grads = lf.value_and_grad(lambda p: loss_of(adapter(model, p, batch)))(params)
    _, merged = lf.value_and_grad(
        lambda p: loss_of(functional_call(model, lf.merge(adapter, model, p), (), batch))
    )(params)
    scale = max(leaf.abs().max().item() for leaf in merged.values())
    assert largest(grads, merged) <= 5e-4 * scale  # float32

    lf.save(tmp_path / "a.safetensors", adapter, params)
    again, same = lf.load(tmp_path / "a.safetensors", model, check_base="error")
    with torch.no_grad():  # which kernels run depends on whether something requires grad
        expected = outputs(adapter(model, params, batch))
        for run in (again(model, same, batch), lf.bind(adapter, model, params)(**batch)):
            found = zip(outputs(run), expected, strict=True)
            assert all(torch.equal(given, t) for given, t in found)
    assert state_of(model) == before


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
