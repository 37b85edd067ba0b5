"""The laws that every variant keeps. Hypothesis draws shapes, ranks and seeds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import CASES, Case, layers
from hypothesis import given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.testing import LAWS, Broken, Law, check_variant


def over_the_catalogue(law: Law) -> Callable[..., None]:
    """The test of one law, over each case that it applies to, in each of its dtypes."""

    @pytest.mark.parametrize("dtype", law.dtypes, ids=lambda dtype: str(dtype).split(".")[1])
    @pytest.mark.parametrize("case", applying(law))
    @given(data=st.data())
    def test(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
        sizes = st.integers(2 if law.largest < 96 else 1, law.largest)
        law.check(data.draw(layers(case, dtype, sizes, law.leads)))

    test.__doc__ = law.statement
    return test


def applying(law: Law) -> list:
    """The cases to which a law applies."""
    return [
        pytest.param(case, id=name)
        for name, case in CASES.items()
        if law.applies(case.example) and (case.trains or not law.trains)
    ]


# One function for each law: hypothesis chains the settings of all runs of one function.
globals().update({f"test_{name}": over_the_catalogue(law) for name, law in LAWS.items()})


def test_catalogue_is_covered():
    assert {type(case.example) for case in CASES.values()} == set(lf.VARIANTS.values())
    assert all(name == variant.name() for name, variant in lf.VARIANTS.items())


# check_variant: the same laws, for a researcher's own variant


@dataclass(frozen=True, kw_only=True)
class Mine(lf.Variant):
    """out = base_out + (x Aᵀ) Bᵀ, written without a card, as in a notebook."""

    r: int = 4

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        A = torch.randn(self.r, d_in, generator=generator) * d_in**-0.5
        return lf.Params({"A": A, "B": torch.zeros(d_out, self.r)})

    def apply(self, x, base_out, weight, params):
        A, B = params["A"].to(x.dtype), params["B"].to(x.dtype)
        return base_out + ((x @ A.mT) @ B.mT).to(base_out.dtype)

    def merged(self, weight, params):
        return weight.dense() + params["B"] @ params["A"], weight.bias


def test_a_variant_of_ones_own_passes():
    report = check_variant(Mine())
    assert report.held.keys() == LAWS.keys()
    assert "Mine(r=4): 17 laws hold" in str(report)
    assert not report.left_out


class WrongSign(Mine):
    """Its merged form has another sign than its forward."""

    def merged(self, weight, params):
        return weight.dense() - params["B"] @ params["A"], weight.bias


class OffAtInit(Mine):
    """B starts away from zero."""

    def init(self, weight, generator, stats=None):
        params = super().init(weight, generator)
        params.trainable["B"].add_(1e-3)
        return params


class BranchesOnData(Mine):
    """Reads a number out of a tensor."""

    def apply(self, x, base_out, weight, params):
        out = super().apply(x, base_out, weight, params)
        return out if params["B"].abs().sum().item() > 0 else base_out


class GlobalDraw(Mine):
    """Draws from torch's own generator."""

    def init(self, weight, generator, stats=None):
        return super().init(weight, None)


@pytest.mark.parametrize(
    ("kind", "law", "numbers"),
    [
        (
            WrongSign,
            "equals_the_merged_layer",
            r"out against the merged layer: [\d.]+ off, at most",
        ),
        (OffAtInit, "identity_at_init", r"base output: [\d.e-]+ off, expected equality to the bit"),
        (BranchesOnData, "vmap_is_the_loop", r"RuntimeError: .*vmap"),
        (GlobalDraw, "draws_from_the_generator_alone", r"A drawn again from the same seed: .* off"),
    ],
)
def test_a_broken_variant_is_told_which_law_it_breaks(kind, law, numbers):
    with pytest.raises(Broken) as error:
        check_variant(kind())
    message = str(error.value)
    assert f"{law} (" in message
    assert re.search(numbers, message)
    assert "on a layer of shape" in message


def test_unknown_laws_are_named():
    with pytest.raises(
        lf.LoraFuncError, match=r"unknown law \['identity'\]; the laws are \['purity'"
    ):
        check_variant(Mine(), laws=["identity"])
