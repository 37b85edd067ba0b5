"""`probe` tells a live adapter from one that reaches nothing."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from cases import catalogue, data_for
from models import adapted, mlp, state_of, text_batch, tiny_llama
from torch import nn

import lora_func as lf
from lora_func.testing import rounding_at_init

AT_BASE = catalogue(at_base=True)


@pytest.mark.parametrize("variant", AT_BASE.values(), ids=AT_BASE.keys())
def test_a_live_adapter(variant):
    model, batch = tiny_llama(), text_batch()
    adapter, params = lf.adapt(model, variant, **data_for(variant, model, lf.Targets()))
    before = state_of(model)
    found = lf.probe(adapter, model, params, batch)
    assert state_of(model) == before
    assert found.base_unchanged
    assert (found.targets, found.trainable) == (14, sum(leaf.numel() for leaf in params.values()))
    # x passes through many layers: a hundred times the rounding of one.
    assert found.difference <= 100 * rounding_at_init(variant, torch.float32)
    assert found.perturbation > 1e-4
    assert found.gradient_norm > 0
    assert found.loss == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert found.live.keys() == set(adapter.targets)
    assert not found.inert
    assert not found.dead
    assert lf.probe(adapter, model, params, batch) == found


class Bypassing(nn.Module):
    """Reads the weight of a layer without calling it, and drops the output of another."""

    def __init__(self):
        super().__init__()
        self.called, self.bypassed, self.dropped = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        self.dropped(x)
        return self.called(F.linear(x, self.bypassed.weight, self.bypassed.bias))


def test_inert_layers_are_named():
    model, adapter, params = adapted(model=Bypassing(), targets=lf.Targets())
    found = lf.probe(adapter, model, params, torch.randn(3, 4))
    assert found.inert == ("bypassed", "dropped")
    assert found.dead == tuple(key for key in params if not key.startswith("called"))
    text = str(found)
    assert "1 of 3" in text
    assert "inert: bypassed" in text
    assert "dead:  dropped.lora_B" in text


def test_no_output_to_probe():
    class Counts(nn.Sequential):
        def forward(self, input):
            return (super().forward(input) > 0).sum()

    model, adapter, params = adapted(model=Counts(nn.Linear(4, 4)), targets=lf.Targets())
    message = "the model returned Tensor without a floating tensor: nothing to probe"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.probe(adapter, model, params, torch.randn(3, 4))


def test_printed():
    model, adapter, params = adapted(lf.IA3(), mlp(), targets=lf.Targets(roles=()))
    params = {key: torch.zeros_like(leaf) for key, leaf in params.items()}
    found = lf.probe(adapter, model, params, torch.ones(2, 6))
    assert str(found).splitlines() == [
        "targets                 3",
        "live                    3 of 3",
        "trainable parameters    36",
        "difference to the base  0",
        f"change when moved       {found.perturbation:.3g}",
        f"loss                    {found.loss:.4g}",
        f"gradient norm           {found.gradient_norm:.4g}",
        "dead leaves             0",
        "base unchanged          yes",
    ]


def test_its_numbers_are_those_of_the_call():
    """The difference to the base, and the norm of the whole gradient, at trained parameters."""
    model, adapter, params = adapted(lf.LoRA(r=2), mlp(), targets=lf.Targets(roles=()))
    x = torch.randn(5, 6)
    found = lf.probe(adapter, model, params, x)
    loss, grads = lf.value_and_grad(lambda p: adapter(model, p, x).square().mean())(params)
    whole = torch.cat([grad.flatten() for grad in grads.values()])
    assert found.difference == (adapter(model, params, x) - model(x)).abs().max().item() > 0
    assert found.loss == pytest.approx(loss.item())
    assert found.gradient_norm == pytest.approx(whole.norm().item())


def test_a_model_that_changes_itself_is_told():
    class Counting(nn.Sequential):
        def forward(self, input):
            self.get_buffer("calls").add_(1)
            return super().forward(input)

    model = Counting(nn.Linear(4, 4))
    model.register_buffer("calls", torch.zeros(()))
    model, adapter, params = adapted(model=model, targets=lf.Targets())
    found = lf.probe(adapter, model, params, torch.randn(3, 4))
    assert not found.base_unchanged
    assert re.search(r"base unchanged +NO", str(found))
