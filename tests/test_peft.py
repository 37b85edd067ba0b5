"""Differential tests against PEFT: the same parameters give the same outputs and the same gradients, in float32.

Each entry names PEFT's config and the map from our leaves to PEFT's parameters (the shapes differ, the numbers do not).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_func as lf

D_IN, D_OUT, R = 24, 16, 6
TOLERANCE = 1e-5  # float32, relative to the largest entry


class Net(nn.Module):
    """One adapted layer between two that are not, so that gradients arrive from both sides."""

    def __init__(self, bias: bool):
        super().__init__()
        self.first = nn.Linear(8, D_IN)
        self.target = nn.Linear(D_IN, D_OUT, bias=bias)
        self.last = nn.Linear(D_OUT, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.target(torch.tanh(self.first(x)))))


@dataclass(frozen=True)
class Pair:
    variant: lf.Variant
    config: peft.PeftConfig
    to_peft: dict[str, tuple[str, Callable[[Tensor], Tensor]]]  # leaf -> (PEFT's parameter, our value -> PEFT's value)
    anchors: dict[str, str] = field(default_factory=dict)  # frozen leaf -> PEFT's parameter at init


def same(t: Tensor) -> Tensor:
    return t


A_B = {"A": ("lora_A.default.weight", same), "B": ("lora_B.default.weight", same)}
common: dict[str, Any] = {"target_modules": ["target"]}
lora: dict[str, Any] = {"r": R, "lora_alpha": 9.0, "lora_dropout": 0.0, **common}
PAIRS = {
    "lora": Pair(lf.LoRA(r=R, alpha=9.0), peft.LoraConfig(**lora), A_B),
    "rslora": Pair(lf.LoRA(r=R, alpha=9.0, rslora=True), peft.LoraConfig(**lora, use_rslora=True), A_B),
    "pissa": Pair(
        lf.PiSSA(r=R, alpha=9.0),
        peft.LoraConfig(**lora, init_lora_weights="pissa"),
        A_B,
        anchors={"A0": "lora_A.default.weight", "B0": "lora_B.default.weight"},
    ),
    "dora": Pair(
        lf.DoRA(r=R, alpha=9.0),
        peft.LoraConfig(**lora, use_dora=True),
        {**A_B, "m": ("lora_magnitude_vector.default.weight", same)},
    ),
    "delora": Pair(
        lf.DeLoRA(r=R, lambda0=3.0),
        peft.DeloraConfig(r=R, delora_lambda=3.0, **common),
        {
            "A": ("delora_A.default", same),
            "B": ("delora_B.default", same),
            "lam": ("delora_lambda.default", lambda t: t.reshape(1)),
        },
    ),
    "ia3": Pair(
        lf.IA3(),
        peft.IA3Config(**common, feedforward_modules=[]),
        {"d": ("ia3_l.default", lambda d: (1 + d)[:, None])},
    ),
    "ia3ff": Pair(
        lf.IA3FF(),
        peft.IA3Config(**common, feedforward_modules=["target"]),
        {"d": ("ia3_l.default", lambda d: (1 + d)[None, :])},
    ),
    "hra": Pair(lf.HRA(r=R), peft.HRAConfig(r=R, **common), {"U": ("hra_u.default", lambda U: U.mT)}),
}


PEFT_HAS = ("lora", "pissa", "dora", "delora", "ia3", "ia3ff", "hra")


def test_every_variant_that_peft_has_is_compared():
    assert {type(pair.variant) for pair in PAIRS.values()} == {lf.VARIANTS[name] for name in PEFT_HAS}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_outputs_and_gradients(pair: Pair, bias: bool):
    model = Net(bias)
    adapter, params = lf.adapt(model, pair.variant, targets=lf.Targets(names=("target",), roles=()))
    theirs = peft.get_peft_model(copy.deepcopy(model), pair.config)
    peft_params = {name.split("target.")[1]: p for name, p in theirs.named_parameters() if "target." in name}

    if pair.anchors:  # the signs of singular vectors are arbitrary: start from PEFT's
        frozen = {f"target.lora_{name}": peft_params[theirs_].detach().clone() for name, theirs_ in pair.anchors.items()}
        adapter = type(adapter)(adapter.variants, adapter.shapes, frozen, adapter.base, adapter.dtype)
        params = adapter.init(model)
    trained = {key: leaf + 0.3 * torch.randn_like(leaf) for key, leaf in params.items()}
    with torch.no_grad():
        for name, (theirs_, convert) in pair.to_peft.items():
            peft_params[theirs_].copy_(convert(trained[f"target.lora_{name}"]))

    x, weights = torch.randn(5, 7, 8), torch.randn(5, 7, 4)
    assert_close(adapter(model, trained, x), theirs(x))

    (theirs(x) * weights).sum().backward()
    grads = torch.func.grad(lambda p: (adapter(model, p, x) * weights).sum())(trained)
    for name, (theirs_, convert) in pair.to_peft.items():
        gradient = grads[f"target.lora_{name}"]
        # `convert` permutes and shifts entries; on gradients only the permutation applies
        assert_close(convert(gradient) - convert(torch.zeros_like(gradient)), peft_params[theirs_].grad)
    xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    (adapter(model, trained, xs[0]) * weights).sum().backward()
    (theirs(xs[1]) * weights).sum().backward()
    assert_close(xs[0].grad, xs[1].grad)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_number_of_parameters(pair: Pair):
    model = Net(bias=True)
    _, params = lf.adapt(model, pair.variant, targets=lf.Targets(names=("target",), roles=()))
    theirs = peft.get_peft_model(copy.deepcopy(model), pair.config)
    assert sum(p.numel() for p in params.values()) == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_pissa_finds_their_factors():
    """Up to the signs of singular vectors, which the product does not see."""
    model = Net(bias=True)
    adapter, _ = lf.adapt(model, PAIRS["pissa"].variant, targets=lf.Targets(names=("target",), roles=()))
    theirs = peft.get_peft_model(copy.deepcopy(model), PAIRS["pissa"].config).base_model.model.target
    assert_close(
        adapter.frozen["target.lora_B0"] @ adapter.frozen["target.lora_A0"],
        theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight,
    )


def assert_close(given: Tensor, reference: Tensor) -> None:
    assert given.shape == reference.shape
    assert (given - reference).abs().max() <= TOLERANCE * reference.abs().max()
