"""AdaLoRA's allocator, against PEFT's with the same parameters and gradients."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from models import mlp
from torch import Tensor, nn

import lora_func as lf
from lora_func.variants.adalora import orthogonality

TARGETS = lf.Targets(names=("0", "2"))
TOTAL, R, TARGET = 12, 4, 2


def drawn() -> tuple[lf.Adapter, dict[str, Tensor]]:
    adapter, params = lf.adapt(mlp(), lf.AdaLoRA(r=R), targets=TARGETS)
    return adapter, {key: leaf + 0.1 * torch.randn_like(leaf) for key, leaf in params.items()}


def grads_like(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.randn_like(leaf) for key, leaf in params.items()}


def test_it_is_that_of_peft():
    """Every step of the schedule masks the same triplets, and keeps the others to the bit."""
    adapter, params = drawn()
    config = peft.AdaLoraConfig(
        init_r=R, target_r=TARGET, tinit=2, tfinal=3, deltaT=2, total_step=TOTAL,
        target_modules=["0", "2"],
    )  # fmt: skip
    theirs: Any = peft.get_peft_model(nn.Sequential(*mlp()), config)
    named = dict(theirs.named_parameters())
    pairs = {
        key: named[f"base_model.model.{path}.lora_{name}.default"]
        for key in params
        for path, name in [key.split(".lora_")]
    }
    allocator = lf.RankAllocator(target_r=TARGET, warmup=2, final=3, interval=2, total=TOTAL)
    state = allocator.init(adapter, params)
    masked = 0
    for step in range(TOTAL):
        params = {key: leaf + 0.05 * torch.randn_like(leaf) for key, leaf in params.items()}
        grads = grads_like(params)
        for key, parameter in pairs.items():
            parameter.data = params[key].reshape(parameter.shape).clone()
            parameter.grad = grads[key].reshape(parameter.shape)
        theirs.base_model.rankallocator.update_and_allocate(theirs.base_model, step)
        state, params = allocator.step(state, params, grads, step)
        for key, parameter in pairs.items():
            assert torch.equal(params[key], parameter.detach().reshape(params[key].shape))
        masked += sum((leaf == 0).sum() for key, leaf in params.items() if key.endswith("E"))
    left = sum((leaf != 0).sum() for key, leaf in params.items() if key.endswith("E"))
    assert left == TARGET * len(adapter.targets)
    assert masked > 0


def test_it_is_pure():
    adapter, params = drawn()
    allocator = lf.RankAllocator(target_r=1, total=2)
    state = allocator.init(adapter, params)
    kept = {**state, **params}
    before = {key: leaf.clone() for key, leaf in kept.items()}
    allocator.step(state, params, grads_like(params), 1)
    assert all(torch.equal(kept[key], before[key]) for key in kept)


def test_orthogonality_is_zero_for_orthonormal_factors():
    Q = torch.linalg.qr(torch.randn(8, 3)).Q
    assert orthogonality(Q.mT, Q) < 1e-10
    assert orthogonality(2 * Q.mT, Q) == pytest.approx(27, rel=1e-4)  # |4 I - I|²


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total": 4, "warmup": 2, "final": 2}, "expected more steps than warmup=2 and final=2"),
        ({"total": 4, "target_r": 0}, "target_r=0; expected an integer of at least 1"),
        ({"total": 4, "beta1": 1.0}, "beta1=1.0; expected a number in"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.RankAllocator(**fields)


def test_another_variant_or_other_gradients():
    allocator = lf.RankAllocator(total=4)
    adapter, params = lf.adapt(mlp(), lf.LoRA(r=2))
    with pytest.raises(lf.LoraFuncError, match="allocates AdaLoRA's ranks, not those of"):
        allocator.init(adapter, params)
    adapter, params = drawn()
    state = allocator.init(adapter, params)
    with pytest.raises(lf.LoraFuncError, match=r"params or grads have no '0\.lora_A'"):
        allocator.step(state, params, {}, 0)


def test_one_within_a_chain_is_refused():
    rules = {"^0$": lf.AdaLoRA(r=R), "^2$": lf.Chain(lf.AdaLoRA(r=R), lf.IA3())}
    adapter, params = lf.adapt(mlp(), rules, targets=TARGETS)
    with pytest.raises(lf.LoraFuncError, match="'2' has an AdaLoRA within a Chain"):
        lf.RankAllocator(target_r=TARGET, total=TOTAL).init(adapter, params)
