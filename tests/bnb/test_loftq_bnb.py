"""`LoftQ` on bitsandbytes' layers: an adapted quantized model is nearer to the float one."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft.utils import loftq_utils
from test_bnb import (
    Q_V_DOWN,
    batch_on,
    device,  # noqa: F401  (a fixture)
    llama,
    over_kinds,
    pack,
    pytestmark,  # noqa: F401
)
from torch import Tensor, nn

import lora_func as lf


def weights_of(model: nn.Module) -> dict[str, Any]:
    """path -> weight: the stats."""
    return {path: model.get_submodule(path).weight for path in Q_V_DOWN.find(model)}


@over_kinds
def test_the_quantized_model_comes_nearer(kind, device):  # noqa: F811
    """The higher the rank is, the nearer, and at the full rank it is the float model.

    Only the adapted layers are quantized. The packed weights keep their bits.
    """
    float_model = llama().to(device).requires_grad_(False)
    model = copy.deepcopy(float_model)
    for path in Q_V_DOWN.find(model):
        model.set_submodule(path, pack(model.get_submodule(path), kind, device))
    model.train()  # in eval mode the kernels round their input
    batch = batch_on(device)
    packed, expected = weights_of(copy.deepcopy(model)), float_model(**batch).logits

    def error(logits: Tensor) -> float:
        return ((logits - expected).norm() / expected.norm()).item()

    errors = [error(model(**batch).logits)]
    full = {path: lf.LoftQ(r=min(w.shape)) for path, w in weights_of(float_model).items()}
    for rules in (lf.LoftQ(r=4), lf.LoftQ(r=16), full):
        adapter, params = lf.adapt(model, rules, targets=Q_V_DOWN, stats=weights_of(float_model))
        errors.append(error(adapter(model, params, batch).logits))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5 < errors[0]
    assert all(torch.equal(weight, packed[path]) for path, weight in weights_of(model).items())


class Stays:
    """A float weight that PEFT's code cannot move to a GPU, where it computes."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def to(self, dtype: torch.dtype, **_: str) -> Tensor:
        return self.weight.to(dtype)


@pytest.mark.parametrize("kind", ["nf4", "nf4, nested"])
def test_the_start_is_that_of_peft(kind):
    """With alpha = r, rows of A and columns of B are those of `replace_lora_weights_loftq`."""
    layer, r = nn.Linear(64, 32), 4
    float_weight = layer.weight.detach().clone()
    packed: bnb.nn.Linear4bit = pack(layer, kind, "cpu")
    stays: Any = Stays(float_weight)
    A, B = loftq_utils._loftq_init_new(packed.weight, stays, num_bits=4, reduced_rank=r)
    model = nn.Sequential(packed)
    variant, targets = lf.LoftQ(r=r, alpha=float(r)), lf.Targets(roles=())
    _, params = lf.adapt(model, variant, targets=targets, stats={"0": float_weight})
    for ours, expected in ((params["0.lora_A"], A), (params["0.lora_B"].mT, B.mT)):
        signs = (ours * expected).sum(1, keepdim=True).sign()
        torch.testing.assert_close(ours, signs * expected, rtol=1e-4, atol=1e-6)
