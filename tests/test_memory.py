"""What an adapter makes autograd keep for backward, in bytes, beyond what the frozen base keeps."""

from __future__ import annotations

import pytest
import torch
from cases import data_for
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


# activations beyond the layer input itself, which is kept once for both layers: DoRA needs base_out for the gradient of its
# magnitudes; IA3 likewise for its gates, and ablation for its directions; HRA reads the input as LoRA does, and the other
# adapters along singular directions only what they keep of it
ACTIVATIONS = {name: 0 for name in lf.VARIANTS} | {"dora": 2, "ia3": 2, "antipastoablate": 2}
TWICE = ("pissa", "milora", "olora", "corda", "loraga")  # the rank of what is telescoped
MAKE = {"antipastoarrow": lambda: lf.AntiPaSTOArrow(r=R, block=2), "eva": lambda: lf.EVA(r=R, rho=1.0)}


@pytest.mark.parametrize("name", [name for name in lf.VARIANTS if name != "ssteer"])  # which trains nothing
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_bytes_kept_for_backward(name, bias):
    """The input once, an [tokens, r] intermediate a layer, and what the method needs by its gradient; nothing dense."""
    variant = MAKE[name]() if name in MAKE else lf.VARIANTS[name](**({} if name.startswith("ia3") else {"r": R}))
    model, x = Block(bias), torch.randn(TOKENS, D, requires_grad=True)
    adapter, params = lf.adapt(model, variant, targets=lf.Targets(), **data_for(variant, model, lf.Targets()))
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x, *adapter.frozen.values(), *leaves.values())}
    base = kept(lambda: model.requires_grad_(False)(x))
    beyond = {
        storage: size for storage, size in kept(lambda: adapter(model, leaves, x)).items() if storage not in own | base.keys()
    }
    factors = 12 * R * D * 4 * 2  # casts, products and norms of A and B, of the size of the parameters
    rank = 2 * R if name in TWICE else R
    allowed = ACTIVATIONS[name] * ACTIVATION + 2 * rank * TOKENS * 4 + factors
    assert sum(beyond.values()) <= allowed
    assert all(size <= max(ACTIVATION if ACTIVATIONS[name] else 0, 2 * SMALL, 4 * R * D * 4) for size in beyond.values())
    assert factors < ACTIVATION / 4  # the allowance could not hide an activation
    assert factors < DENSE  # nor a dense matrix


def test_the_measure_notices_a_dense_matrix():
    x, A, B = torch.randn(TOKENS, D), torch.randn(R, D, requires_grad=True), torch.randn(D, R, requires_grad=True)
    x.requires_grad_()
    assert max(kept(lambda: x @ (B @ A).mT).values()) >= DENSE
