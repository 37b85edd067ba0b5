"""`LoKr`: how sizes split into factors, and which leaves a layer has."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import nn

import lora_func as lf


@pytest.mark.parametrize("factor", [None, *range(1, 40), 128])
def test_sizes_split_as_in_peft(factor):
    variant = lf.LoKr(decompose_factor=factor)
    for d in range(1, 400):
        expected = factorization(d, -1 if factor is None else factor)
        assert (variant.outer(d), variant.inner(d)) == expected


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("factor", [None, 2, 8, 48])
@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (128, 128), (31, 64), (7, 7)])
@pytest.mark.parametrize("r", [1, 3, 8])
def test_leaves_and_outputs_are_those_of_peft(r, shape, factor, both):
    """Whichever of the two factors are products, also where a prime size does not split."""
    d_out, d_in = shape
    config = peft.LoKrConfig(
        r=r,
        alpha=3,
        decompose_factor=-1 if factor is None else factor,
        decompose_both=both,
        target_modules=["0"],
    )
    base = nn.Linear(d_in, d_out)
    theirs = peft.get_peft_model(nn.Sequential(base), config)
    own = {name.split(".")[-2]: p for name, p in theirs.named_parameters() if p.requires_grad}
    variant = lf.LoKr(r=r, alpha=3.0, decompose_factor=factor, decompose_both=both)
    weight = lf.Weight(base.weight.detach(), base.bias.detach())
    drawn = variant.init(weight, None).trainable
    params = {name: 0.3 * torch.randn_like(leaf) for name, leaf in drawn.items()}
    assert {f"lokr_{'_'.join((name[:2], *name[2:]))}" for name in params} == own.keys()
    with torch.no_grad():
        for name, leaf in params.items():
            own[f"lokr_{'_'.join((name[:2], *name[2:]))}"].copy_(leaf)
        x = torch.randn(5, d_in)
        expected = theirs(x)
    out = variant.apply(x, base(x), weight, params)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_no_factor_has_no_size():
    with pytest.raises(lf.LoraFuncError, match=r"decompose_factor=0\): .* at least 1"):
        lf.LoKr(decompose_factor=0)
