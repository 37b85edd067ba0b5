"""Differential tests against PEFT: the same parameters give the same outputs and gradients.

In float32. `lora_func.interop.peft` maps our leaves to PEFT's parameters: the shapes differ, the
numbers do not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import peft
import pytest
import torch
from cases import CASES, Case
from common import peft_config
from peft_folders import compiled  # noqa: F401  (a fixture)
from torch import Tensor, nn

import lora_func as lf
from lora_func.interop.peft.method import Leaf, Method
from lora_func.interop.peft.methods import METHODS

R = 4
TOLERANCE = 1e-5  # float32, relative to the largest entry
HERE = lf.Targets(names=("target",))

compared = {name: case for name, case in CASES.items() if case.peft is not None}
over_compared = pytest.mark.parametrize("case", compared.values(), ids=compared.keys())


class Net(nn.Module):
    """One adapted layer between two others, so that gradients arrive from both sides."""

    def __init__(self, bias: bool, d_in: int = 24, d_out: int = 16):
        super().__init__()
        self.first = nn.Linear(8, d_in)
        self.target = nn.Linear(d_in, d_out, bias=bias)
        self.last = nn.Linear(d_out, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.target(torch.tanh(self.first(x)))))


def key_of(name: str, keys: Iterable[str]) -> str:
    """The key of a leaf of the layer, or of all layers."""
    return next(key for key in keys if key.partition(".lora_")[2] == name)


def parameter(key: str) -> str:
    """The name in PEFT's layer of what its files call `key`."""
    special = {
        "lora_magnitude_vector": "lora_magnitude_vector.weight",
        "tinylora_v": "tinylora_v.0",
    }
    name, dot, rest = special.get(key, key).partition(".")
    return f"{name}.default{dot}{rest}"


def method_for(case: Case) -> Method:
    """PEFT's method of a case."""
    variant = case.variant(R)
    own = [method for method in METHODS if method.kind is type(variant)]
    return next((method for method in own if method.accepts(variant)), own[0])


def leaves_of(case: Case, params: Mapping[str, Tensor]) -> dict[str, Leaf]:
    """The trainable leaves, with PEFT's names of their parameters."""
    method = method_for(case)
    names = {key.partition(".lora_")[2] for key in params}
    return {
        name: leaf for name, leaf in {**method.leaves, **method.shared}.items() if name in names
    }


def config_of(case: Case) -> Any:
    """PEFT's config of the same method, with the same rank and scale."""
    assert case.peft is not None
    return peft_config(case.variant(R), ["target"], **case.peft.fields)


def pair(case: Case, model: nn.Module) -> tuple[lf.Adapter, dict[str, Tensor], Any, dict]:
    """Our adapter, moved parameters, PEFT's model with the same ones, and those of its layer."""
    adapter, params = lf.adapt(model, case.variant(R), targets=HERE)
    theirs = peft.get_peft_model(copy.deepcopy(model), config_of(case))
    own = {n.split("target.")[1]: p for n, p in theirs.named_parameters() if "target." in n}
    # The signs of singular vectors and the positions of a mask are arbitrary: start from PEFT's.
    frozen = {f"target.lora_{k}": own[v].detach().clone() for k, v in case.peft.anchors.items()}
    layer = theirs.base_model.model.target
    frozen |= {f"target.lora_{k}": read(layer) for k, read in case.peft.constants.items()}
    if frozen:
        adapter = lf.Adapter(adapter.variants, adapter.shapes, frozen, adapter.base, adapter.dtype)
        params = adapter.init(model)
    buffers = {name.split("target.")[-1]: t for name, t in theirs.named_buffers()}
    for name, leaf in method_for(case).shared.items():
        if f"shared.lora_{name}" in adapter.frozen:
            buffers[parameter(leaf.key)].copy_(adapter.frozen[f"shared.lora_{name}"])
    trained = {key: leaf + 0.3 * torch.randn_like(leaf) for key, leaf in params.items()}
    with torch.no_grad():
        for name, leaf in leaves_of(case, trained).items():
            own[parameter(leaf.key)].copy_(leaf.theirs(trained[key_of(name, trained)]))
    return adapter, trained, theirs, own


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=["narrowing", "widening"])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of PEFT's SHiRA
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # to a layer without a bias
@over_compared
def test_outputs_and_gradients(case: Case, shape, bias: bool):
    model = Net(bias, *shape)
    adapter, trained, theirs, own = pair(case, model)
    x, weights = torch.randn(5, 7, 8), torch.randn(5, 7, 4)
    assert_close(adapter(model, trained, x), theirs(x))

    (theirs(x) * weights).sum().backward()
    grads = torch.func.grad(lambda p: (adapter(model, p, x) * weights).sum())(trained)
    for name, leaf in leaves_of(case, grads).items():
        gradient = grads[key_of(name, grads)]
        # `theirs` permutes and shifts entries; on gradients only the permutation applies.
        moved = leaf.theirs(gradient) - leaf.theirs(torch.zeros_like(gradient))
        given = own[parameter(leaf.key)].grad
        assert_close(moved / 2 if name in case.peft.twice else moved, given)
    xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    (adapter(model, trained, xs[0]) * weights).sum().backward()
    (theirs(xs[1]) * weights).sum().backward()
    if case.peft.gradient_in_x:
        assert_close(xs[0].grad, xs[1].grad)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of PEFT's SHiRA
@over_compared
def test_merged_weights(case: Case):
    model = Net(bias=True)
    adapter, trained, theirs, _ = pair(case, model)
    expected = theirs.merge_and_unload().target.weight
    assert_close(lf.merge(adapter, model, trained)["target.weight"], expected)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=n) for n, case in compared.items() if case.peft and not case.peft.twice],
)
def test_number_of_parameters(case: Case):
    model = Net(bias=True)
    _, params = lf.adapt(model, case.variant(R), targets=HERE)
    theirs = peft.get_peft_model(copy.deepcopy(model), config_of(case))
    trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in params.values()) == trainable


def test_pissa_finds_their_factors():
    """The signs of singular vectors are free, and cancel in the product."""
    model, case = Net(bias=True), CASES["pissa"]
    adapter, _ = lf.adapt(model, case.variant(R), targets=HERE)
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), config_of(case))
    A0, B0 = (adapter.frozen[f"target.lora_{leaf}"] for leaf in ("A0", "B0"))
    layer = theirs.base_model.model.target
    assert_close(B0 @ A0, layer.lora_B["default"].weight @ layer.lora_A["default"].weight)


def test_every_method_of_peft_is_compared():
    """It is compared here, or its init is, in test_peft_inits.py or test_loftq.py."""
    named = {name for name, kind in lf.VARIANTS.items() if kind.card.peft is not None}
    here = {case.example.name() for case in compared.values()}
    assert named - here == {"corda", "loraga", "eva", "loftq"}


def assert_close(given: Tensor | None, reference: Tensor | None) -> None:
    assert given is not None
    assert reference is not None
    assert given.shape == reference.shape
    assert (given - reference).abs().max() <= TOLERANCE * reference.abs().max()
