"""Equal layers prepare together: the same outputs and gradients as layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import catalogue, data_for
from torch import nn

import lora_func as lf
from lora_func.engine import together

TOGETHER = {name: v for name, v in catalogue().items() if v.prepares_together}
TARGETS = lf.Targets(names=("up", "down"))
over_variants = pytest.mark.parametrize("name", TOGETHER)


class Blocks(nn.Module):
    """Four layers of one shape, and four of another. It runs the first `blocks` of each."""

    def __init__(self, bias: bool):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(16, 32, bias) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(32, 16, bias) for _ in range(4))
        self.double()

    def forward(self, x, blocks=4):
        for up, down in list(zip(self.up, self.down))[:blocks]:
            x = x + down(up(x).tanh())
        return x


def adapted(variant, bias=True):
    """A model, its adapter, leaves that have moved, and an input."""
    torch.manual_seed(0)
    model = Blocks(bias)
    adapter, params = lf.adapt(
        model, variant, targets=TARGETS, dtype=torch.float64, **data_for(variant, model, TARGETS)
    )
    leaves = {k: (t + 0.1 * torch.randn_like(t)).requires_grad_() for k, t in params.items()}
    return model, adapter, leaves, torch.randn(6, 16, dtype=torch.float64)


def run(model, adapter, leaves, x, blocks=4):
    """The output, and the gradient of each leaf."""
    out = adapter(model, leaves, {"x": x, "blocks": blocks})
    loss = (out * torch.linspace(-1, 1, out.numel()).to(out).view_as(out)).sum()
    return out, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)


def check_equal(given, expected):
    (out, grads), (other, theirs) = given, expected
    torch.testing.assert_close(out, other, rtol=0, atol=1e-10)
    for grad, their in zip(grads, theirs, strict=True):
        assert (grad is None) == (their is None)
        if grad is not None:
            torch.testing.assert_close(grad, their, rtol=1e-9, atol=1e-10)


@over_variants
@pytest.mark.parametrize("bias", [True, False])
def test_as_layer_by_layer(name, bias, monkeypatch):
    """Also with layers that do not run: they have no gradient, not zeros."""
    variant = TOGETHER[name]
    parts = adapted(variant, bias)
    given = run(*parts), run(*parts, blocks=2)
    monkeypatch.setattr(type(variant), "prepares_together", False)
    expected = run(*parts), run(*parts, blocks=2)
    for pair in zip(given, expected):
        check_equal(*pair)


@over_variants
def test_an_adapter_for_each_example(name, monkeypatch):
    variant = TOGETHER[name]
    model, adapter, leaves, x = adapted(variant)
    members = [{k: t.detach() * (1 + 0.1 * i) for k, t in leaves.items()} for i in range(6)]
    each = {k: t.requires_grad_() for k, t in lf.stack(members).items()}
    given = run(model, adapter, each, x)
    monkeypatch.setattr(type(variant), "prepares_together", False)
    check_equal(given, run(model, adapter, each, x))


@pytest.mark.parametrize("name", ["dora", "dora-full", "hra", "oft", "pissa"])
def test_transforms(name):
    """torch.func.grad, and vmap over it, as autograd."""
    model, adapter, leaves, x = adapted(TOGETHER[name])
    plain = {key: leaf.detach() for key, leaf in leaves.items()}

    def loss(params, x):
        return adapter(model, params, {"x": x}).square().sum()

    grads = torch.func.grad(loss)(plain, x)
    expected = torch.autograd.grad(loss(leaves, x), list(leaves.values()))
    for grad, their in zip(grads.values(), expected):
        torch.testing.assert_close(grad, their, rtol=1e-9, atol=1e-10)
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(plain, x[:, None])
    for grad, key in zip(each.values(), plain):
        torch.testing.assert_close(grad.sum(0), grads[key], rtol=1e-9, atol=1e-10)


def test_second_derivatives():
    model, adapter, leaves, x = adapted(lf.HRA(r=4))

    def loss(*tensors):
        return adapter(model, dict(zip(leaves, tensors)), x).square().mean()

    assert torch.autograd.gradgradcheck(loss, tuple(leaves.values()), fast_mode=True)


@dataclass(frozen=True, kw_only=True)
class Counting(lf.DoRA):
    """DoRA that counts how often it is prepared."""

    prepares_together = True

    def prepare(self, weight, params, dtype):
        COUNTS.append(dtype)
        return super().prepare(weight, params, dtype)


COUNTS: list[torch.dtype] = []


def test_once_for_a_shape(monkeypatch):
    """As many as fit are stacked at a time, and too few prepare alone."""
    COUNTS.clear()
    parts = adapted(Counting(r=2))
    whole = run(*parts)
    assert len(COUNTS) == 2  # shapes
    monkeypatch.setattr(together, "MOST", 3 * (2 * 16 + 2 * 32 + 2 * 32))
    for fewest, counts in ((2, 4), (4, 8)):
        monkeypatch.setattr(together, "FEWEST", fewest)
        COUNTS.clear()
        check_equal(run(*parts), whole)
        assert len(COUNTS) == counts


def test_a_bound_view_prepares_together():
    """At the start of each forward, and with the bits of a call."""
    model, adapter, leaves, x = adapted(Counting(r=2))
    view = lf.bind(adapter, model, leaves).train()
    out, grads = run(model, adapter, leaves, x)
    COUNTS.clear()
    view(x)
    given = view(x)
    assert torch.equal(given, out)
    assert len(COUNTS) == 4
    loss = (given * torch.linspace(-1, 1, out.numel()).to(out).view_as(out)).sum()
    for grad, their in zip(torch.autograd.grad(loss, list(leaves.values())), grads):
        assert torch.equal(grad, their)
    with torch.no_grad():
        view.eval()
        COUNTS.clear()
        assert torch.equal(view(x), view(x))
        assert len(COUNTS) == 2
        next(iter(leaves.values())).mul_(1.1)
        view(x)
        assert len(COUNTS) == 3


def test_a_part_of_a_bound_view_runs_alone():
    """Outside of the view's own forward, a layer prepares by itself, from the leaves of now."""
    model, adapter, leaves, x = adapted(lf.DoRA(r=2))
    view = lf.bind(adapter, model, leaves).train()
    view(x)
    before = view.up[0](x)
    next(iter(leaves.values())).data.mul_(2)
    assert not torch.allclose(view.up[0](x), before)
