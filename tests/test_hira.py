"""`HiRA`: the formula, and how often it makes the matrix."""

from __future__ import annotations

import pytest
import torch
from cases import over
from torch import nn

import lora_func as lf


@over("hira")
def test_the_dense_formula(layer, data):
    """out = x (W ∘ (1 + B A))ᵀ + b"""
    A, B, W, b = layer.trained["A"], layer.trained["B"], layer.weight.matrix, layer.weight.bias
    expected = layer.x @ (W * (1 + B @ A)).mT + (0 if b is None else b)
    torch.testing.assert_close(layer.at({}), expected, rtol=1e-9, atol=1e-9)


@over("hira")
def test_it_is_a_sum_of_products_with_the_weight(layer, data):
    """Σ_k B_k ∘ (W (A_k ∘ x)), which needs no matrix, and r products."""
    A, B = layer.trained["A"], layer.trained["B"]
    delta = (layer.weight(layer.x[:, None] * A) * B.mT).sum(1)
    torch.testing.assert_close(layer.at({}), layer.base(layer.x) + delta, rtol=1e-9, atol=1e-9)


def test_the_rank_is_not_limited():
    weight, variant = lf.Weight(torch.randn(16, 16)), lf.HiRA(r=1)
    A, B = torch.randn(1, 16), torch.randn(16, 1)
    delta = variant.merged(weight, {"A": A, "B": B})[0] - weight.matrix
    assert torch.linalg.matrix_rank(delta) == 16


class Counting(lf.Weight):
    """A packed weight that counts how often its matrix is made."""

    opaque = True
    made = 0

    def dense(self):
        self.made += 1
        return self.matrix.clone()


def test_the_matrix_is_made_once_in_forward_and_once_in_backward():
    variant, weight = lf.HiRA(r=2), Counting(torch.randn(6, 8))
    params = variant.init(weight, None).trainable
    leaves = {name: torch.randn_like(leaf).requires_grad_() for name, leaf in params.items()}
    x = torch.randn(5, 8, requires_grad=True)
    out = variant.apply(x, torch.zeros(5, 6), weight, leaves)
    assert weight.made == 1
    out.sum().backward()
    assert weight.made == 2


@pytest.mark.filterwarnings("ignore:the weight of '0' is not the one:UserWarning")
def test_a_weight_that_changes():
    """Also in a bound view, which keeps nothing of the matrix."""
    linear = nn.Linear(8, 12)
    model, x = nn.Sequential(linear), torch.randn(3, 8)
    adapter, params = lf.adapt(model, lf.HiRA(r=2), targets=lf.Targets(roles=()))
    params = {key: torch.randn_like(leaf) for key, leaf in params.items()}
    bound = lf.bind(adapter, model, params)
    with torch.no_grad():
        bound(x)
        linear.weight.mul_(2.0)
        W = linear.weight * (1 + params["0.lora_B"] @ params["0.lora_A"])
        torch.testing.assert_close(bound(x), x @ W.mT + linear.bias)
