"""`Variant.factors`: whose update has a low rank, and which factors are exact at init."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, catalogue, layers
from hypothesis import given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.testing.laws import has_factors

LOW_RANK = {
    name: case
    for name, case in CASES.items()
    if has_factors(case.example) and not case.own_bias  # which is not in the factors
}


def test_who_has_factors():
    """The others scale or rotate the weight, or add a matrix of full rank."""
    without = {case.example.name() for case in CASES.values() if not has_factors(case.example)}
    scaled_or_rotated = {"dora", "ia3", "ia3ff", "oft", "boft", "road", "hira"}
    of_full_rank = {"full", "shira", "lokr", "c3a", "fourierft", "randlora"}
    assert without == scaled_or_rotated | of_full_rank | {"chain"}  # of which one link is IA3


@pytest.mark.parametrize("name", LOW_RANK)
@given(data=st.data())
def test_the_rank(name, data):
    """r, or 2 r where a frozen start is subtracted."""
    layer = data.draw(layers(LOW_RANK[name], sizes=st.integers(4, 24), leads=((1,),)))
    variant: Any = layer.variant
    A, B = variant.factors(layer.weight, layer.trained)
    r: Any = len(layer.init["A"]) if "A" in layer.names else getattr(variant, "r", None)
    anchored = {"A0", "bank0"} & layer.init.keys()
    expected = 2 * r if anchored else getattr(variant, "k", r)
    if (rank := LOW_RANK[name].rank) is not None:
        expected = rank(variant)
    assert len(A) == B.shape[1] == expected


@pytest.mark.parametrize("name", [name for name in LOW_RANK if name in catalogue()])
@given(data=st.data())
def test_per_example_gradients_through_the_factors(name, data):
    """torch.vmap of torch.func.grad, over rows of x, is the loop."""
    layer = data.draw(layers(LOW_RANK[name], sizes=st.integers(4, 16), leads=((3,),)))

    def loss(leaves, row):
        A, B = layer.variant.factors(layer.weight, {**layer.trained, **leaves})
        return (layer.base(row) + (row @ A.mT) @ B.mT).square().sum()

    grad, leaves = torch.func.grad(loss), layer.leaves()
    mapped = torch.vmap(grad, in_dims=(None, 0))(leaves, layer.x)
    for k, row in enumerate(layer.x):
        loop = grad(leaves, row)
        own = {leaf: t[k] for leaf, t in mapped.items()}
        torch.testing.assert_close(own, loop, rtol=1e-9, atol=1e-9)


def test_a_small_step_is_not_lost_between_large_factors():
    """PiSSA's (B - B0) A + B0 (A - A0) resolves a step that B A - B0 A0 rounds away."""
    weight, variant = lf.Weight(torch.randn(64, 64)), lf.PiSSA(r=8)
    drawn = variant.init(weight, None)
    step = {name: leaf + 1e-6 * torch.randn_like(leaf) for name, leaf in drawn.trainable.items()}
    params = {**step, **drawn.frozen}
    A, B = variant.factors(weight, params)
    p = {name: t.double() for name, t in params.items()}
    exact = p["B"] @ p["A"] - p["B0"] @ p["A0"]
    plain = params["B"] @ params["A"] - params["B0"] @ params["A0"]
    error, lost = ((t.double() - exact).abs().max() / exact.abs().max() for t in (B @ A, plain))
    assert error < 1e-5  # float32
    assert lost > 1e-2
