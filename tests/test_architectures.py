"""It works wherever the model works: every type of model, found by default, exact at init, alive in every layer."""

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

# layers that the model itself computes in vain: LLaVA reads the features of the last layer but one
UNUSED = {"llava": r"vision_tower\.encoder\.layers\.1\."}


def outputs(out) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def loss_of(out) -> torch.Tensor:
    """A fixed random projection: of a normalised output, the mean square would have no gradient."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([(t * torch.randn(t.shape, generator=generator)).sum() for t in outputs(out)]).sum()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name, tmp_path):
    """Targets, identity, liveness, gradients against merged weights, a bound view, a file; and nothing touched the model."""
    make, make_batch, count = ARCHITECTURES[name]
    # frozen, because attention kernels are chosen by whether a bias in the model requires grad
    model, batch = make().eval().requires_grad_(False), make_batch()
    base = outputs(model(**batch))  # first: where LLaVA looks at hidden states, transformers itself leaves hooks on the model
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
    _, merged = lf.value_and_grad(lambda p: loss_of(functional_call(model, lf.merge(adapter, model, p), (), batch)))(params)
    assert largest(grads, merged) <= 5e-4 * max(leaf.abs().max().item() for leaf in merged.values())  # float32

    lf.save(tmp_path / "a.safetensors", adapter, params)
    again, same = lf.load(tmp_path / "a.safetensors", model, check_base="error")
    expected = outputs(adapter(model, params, batch))
    for run in (again(model, same, batch), lf.bind(adapter, model, params)(**batch)):
        assert all(torch.equal(given, t) for given, t in zip(outputs(run), expected, strict=True))
    assert state_of(model) == before


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_transformer_encoder(norm_first, grad):
    """PyTorch's own encoder has a fused path in eval mode without gradients, which never calls its linear layers."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True, norm_first=norm_first)
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
