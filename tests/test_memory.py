"""The bytes that an adapter makes autograd keep for backward, beyond those of the frozen base."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, data_for
from torch import Tensor, nn

import lora_func as lf

TOKENS, D, R = 512, 256, 4
ACTIVATION, DENSE, SMALL = TOKENS * D * 4, D * D * 4, TOKENS * R * 4


class Block(nn.Module):
    """Two layers that read one input, as q_proj and v_proj do."""

    def __init__(self, bias: bool):
        super().__init__()
        self.q, self.v = nn.Linear(D, D, bias), nn.Linear(D, D, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.v(x)


def kept(run) -> dict[int, int]:
    """Storage -> bytes, of the tensors that autograd saves while `run` runs."""
    storages: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        alive.append(t)
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive.append(run())
    return storages


over_trained = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in CASES.items() if case.trains]
)


@over_trained
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_bytes_kept_for_backward(case, bias):
    """It keeps the input once, [tokens, r] intermediates, the case's activations, nothing dense."""
    model, x = Block(bias), torch.randn(TOKENS, D, requires_grad=True)
    variant, targets = case.variant(R), lf.Targets()
    adapter, params = lf.adapt(model, variant, targets=targets, **data_for(variant, model, targets))
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    known = (*model.parameters(), x, *adapter.frozen.values(), *leaves.values())
    own = {t.untyped_storage().data_ptr() for t in known}
    base = kept(lambda: model.requires_grad_(False)(x))
    found = kept(lambda: adapter(model, leaves, x))
    beyond = {storage: size for storage, size in found.items() if storage not in own | base.keys()}
    # Casts, products and norms of A and B, of the size of the parameters.
    factors = 12 * R * D * 4 * 2
    intermediates = 2 * case.products * R * TOKENS * 4
    stacked = sum(leaf.nbytes for leaf in leaves.values())  # equal layers prepare together
    most = 2 * case.activations * ACTIVATION + intermediates + factors + stacked
    assert sum(beyond.values()) <= most
    small = max(case.products, 2) * SMALL
    largest = max(case.activations * ACTIVATION, small, 4 * R * D * 4)
    assert all(size <= largest for size in beyond.values())
    assert factors < ACTIVATION / 4  # the allowance could not hide an activation
    assert factors < DENSE  # nor a dense matrix


def test_the_measure_notices_a_dense_matrix():
    x, A, B = (torch.randn(size, requires_grad=True) for size in ((TOKENS, D), (R, D), (D, R)))
    assert max(kept(lambda: x @ (B @ A).mT).values()) >= DENSE
