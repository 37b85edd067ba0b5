"""The laws that every variant keeps. Hypothesis draws shapes, ranks and seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CASES, Case, layers
from hypothesis import given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.testing import LAWS, Law


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
    kinds = {type(case.example) for case in CASES.values()}
    assert kinds == {*lf.VARIANTS.values(), lf.Chain}
    assert all(name == variant.name() for name, variant in lf.VARIANTS.items())
