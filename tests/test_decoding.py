"""What a bound view keeps: a decoded token computes nothing that does not depend on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, data_for
from models import trained
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lora_func as lf
from lora_func.engine.layer import AdaptedLayer

ALL = lf.Targets(roles=())
VIEWS = (
    *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split"),
    *("squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "view_as_real"),
)


class Independent(TorchDispatchMode):
    """Collects the kernels that run on tensors of which none was computed from `x`."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.computed = [x]  # and all that comes from it, kept alive so that ids stay its own
        self.kernels: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {id(t) for t in self.computed}
        if any(id(t) in known for t in pytree.tree_leaves((args, kwargs))):
            self.computed += [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        elif func.overloadpacket.__name__ not in VIEWS:
            self.kernels.append(str(func))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_a_second_token_computes_from_the_token_alone(case, dtype):
    """No cast, norm, factor or sign of a constant: a bound view has them from the first token.

    Except for what a variant makes anew by design.
    """
    model, variant = nn.Sequential(nn.Linear(8, 12)).to(dtype), case.variant(4)
    adapter, params = lf.adapt(model, variant, targets=ALL, **data_for(variant, model, ALL))
    bound, x = lf.bind(adapter, model, trained(params)), torch.randn(1, 8, dtype=dtype)
    first = bound(x)
    with Independent(x) as found:
        assert torch.equal(bound(x), first)
    casts = {"aten._to_copy.default"} if case.remade else set()  # of what is made anew
    assert [kernel for kernel in found.kernels if kernel not in casts] == list(case.remade)


@torch.no_grad()
def test_what_is_kept_for_a_narrow_dtype_serves_no_wider_one():
    """After tokens under autocast, those in float32 are as exact as before any."""
    model, x = nn.Sequential(nn.Linear(8, 12)), torch.randn(1, 8)
    adapter, params = lf.adapt(model, lf.DoRA(r=2), targets=ALL)
    params = trained(params)
    bound, expected = lf.bind(adapter, model, params), adapter(model, params, x)
    with torch.autocast("cpu", torch.bfloat16):
        bound(x.bfloat16())
    assert torch.equal(bound(x), expected)


@torch.no_grad()
def test_a_change_of_a_bias_that_is_kept_in_another_dtype():
    """The copy that was cast for tokens under autocast is made anew."""
    layer, x = nn.Linear(8, 12), torch.randn(1, 8).bfloat16()
    model = nn.Sequential(layer)
    adapter, params = lf.adapt(model, lf.AntiPaSTO(r=4), targets=ALL)
    params = trained(params)
    bound = lf.bind(adapter, model, params)
    with torch.autocast("cpu", torch.bfloat16):
        before = bound(x)
        layer.bias.add_(1.0)
        assert torch.equal(bound(x), adapter(model, params, x))
        assert not torch.equal(bound(x), before)


@pytest.mark.parametrize(
    ("variant", "own"),
    [
        (lf.AntiPaSTO(r=2), {"gain"}),
        (lf.VeRA(r=2), {"lb", "ld"}),
        (lf.SSVD(r=2), {"turn", "dS"}),
        (lf.DoRA(r=2), {"A", "B", "gain"}),
    ],
    ids=lambda value: value.name() if isinstance(value, lf.Variant) else "",
)
@torch.no_grad()
def test_what_examples_share_is_kept_once(variant, own):
    """Only what comes from leaves has the example axis, and not the bias or a basis."""
    model = nn.Sequential(nn.Linear(8, 12))
    adapter, params = lf.adapt(model, variant, targets=ALL)
    bound = lf.bind(adapter, model, lf.stack([trained(params)] * 3))
    bound(torch.randn(3, 8))
    layer = next(m for m in bound.modules() if isinstance(m, AdaptedLayer))
    assert set(layer._kept.entries.own) == own


@torch.no_grad()
def test_the_measure_notices_a_kernel():
    x, y = torch.ones(2), torch.ones(2)
    with Independent(x) as found:
        _ = (x + 1) * y.neg() + y.view(1, 2)
    assert found.kernels == ["aten.neg.default"]
