"""`Full`: full fine-tuning as a difference, of parameters of any shape."""

from __future__ import annotations

import pytest
import torch
from cases import over
from torch import nn

import lora_func as lf

SHAPES = [(5,), (), (4, 3, 2, 2), (4, 3)]  # a bias, a scalar, a kernel, a matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_parameter_of_any_shape(shape, dtype):
    """One difference of its shape, which starts at zero: the parameter is itself to the bit."""
    weight = lf.Weight(torch.randn(shape, dtype=dtype))
    params = lf.Full().init(weight, None)
    assert weight.shape == shape
    assert {name: tuple(leaf.shape) for name, leaf in params.trainable.items()} == {"D": shape}
    P, bias = lf.Full().merged(weight, params.trainable)
    assert torch.equal(P.to(dtype), weight.matrix)
    assert bias is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_difference_is_added(shape):
    P, D = torch.randn(shape), torch.randn(shape)
    assert torch.equal(lf.Full().merged(lf.Weight(P), {"D": D})[0], P + D)


def test_only_full_takes_any_shape():
    assert {name for name, kind in lf.VARIANTS.items() if kind.card.any_shape} == {"full"}


@pytest.mark.parametrize(
    ("shape", "in_file", "expected"),
    [
        ((4, 3), {"D", "d"}, {"D": (4, 3), "d": (4,)}),
        ((4, 3), {"D"}, {"D": (4, 3)}),
        ((4,), {"D"}, {"D": (4,)}),
        ((4,), {"D", "d"}, {"D": (4,)}),  # a vector has no bias: `load` names d as unexpected
        ((), {"D", "d"}, {"D": ()}),
    ],
)
def test_a_file_tells_whether_its_layer_has_a_bias(shape, in_file, expected):
    leaves = dict.fromkeys(in_file, torch.empty(0))
    params = lf.Full().like(lf.Weight(torch.empty(shape)), leaves)
    assert {name: tuple(leaf.shape) for name, leaf in params.trainable.items()} == expected


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_full_fine_tuning(bias):
    """A step of SGD on the difference is the step of SGD on the weight and the bias."""
    model, x = nn.Sequential(nn.Linear(6, 5, bias), nn.Tanh(), nn.Linear(5, 4, bias)), torch.ones(6)
    adapter, params = lf.adapt(model, lf.Full(), targets=lf.Targets(roles=()))
    grads = torch.func.grad(lambda p: adapter(model, p, x).square().sum())(params)
    stepped = {key: leaf - 0.1 * grads[key] for key, leaf in params.items()}
    weights = dict(model.named_parameters())
    slopes = torch.autograd.grad(model(x).square().sum(), list(weights.values()))
    expected = {name: P - 0.1 * slope for (name, P), slope in zip(weights.items(), slopes)}
    # The two differ by the order of the sums in float32.
    torch.testing.assert_close(lf.merge(adapter, model, stepped), expected)


@over("full")
def test_any_matrix_is_in_reach(layer, data):
    """With D = V - W and d = -b the layer is x Vᵀ."""
    V = torch.randn(layer.weight.shape, dtype=torch.float64)
    leaves = {"D": V - layer.weight.matrix}
    if layer.weight.bias is not None:
        leaves["d"] = -layer.weight.bias
    torch.testing.assert_close(layer.at(leaves), layer.x @ V.mT, rtol=1e-9, atol=1e-9)
