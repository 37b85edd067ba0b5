"""Code that inductor wrote computes what eager code computes, for every variant.

Inductor has lost factors of a sum and a product that it fused (pytorch/pytorch#167313). Whether it
fuses them depends on the shape of the input, so rows and batches of rows are both run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, stats_of
from models import trained
from torch import Tensor, nn

import lora_func as lf
from lora_func.variant import Weight


class Apart(nn.ModuleDict):
    """Layers beside each other: one compilation serves all variants."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: layer(x) for name, layer in self.items()}


def zoo() -> tuple[nn.Module, lf.Adapter, dict[str, Tensor]]:
    """A model with a layer for each variant of the catalogue, in all the forms that tests know."""
    names = {name: name.replace("-", "_") for name, case in CASES.items() if case.engine}
    model: Any = Apart({name: nn.Linear(24, 16) for name in names.values()}).requires_grad_(False)
    rules = {f"^{path}$": CASES[name].variant(4) for name, path in names.items()}
    stats = {
        path: stats_of(rules[f"^{path}$"], Weight(layer.weight, layer.bias))
        for path, layer in model.items()
    }
    adapter, params = lf.adapt(model, rules, stats=stats)
    return model, adapter, trained(params)


@pytest.mark.parametrize("shape", [(32, 24), (4, 8, 24)], ids=["rows", "batches of rows"])
def test_every_variant(shape):
    torch._dynamo.reset()
    model, adapter, params = zoo()
    x = torch.randn(shape)

    def loss(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        out = adapter(model, params, x)
        return torch.stack([y.square().mean() for y in out.values()]).sum(), out

    run = lf.value_and_grad(loss, has_aux=True)
    (_, expected), wanted = run(params)
    compiled = torch.compile(loss, fullgraph=True)
    leaves = {key: leaf.detach().clone().requires_grad_() for key, leaf in params.items()}
    value, out = compiled(leaves)
    for name in expected:
        torch.testing.assert_close(out[name], expected[name], rtol=1e-4, atol=1e-4)
    value.backward()
    for key, leaf in leaves.items():
        given = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(given, wanted[key], rtol=1e-3, atol=1e-4)
