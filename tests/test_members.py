"""Members that differ train in one pass: docs/populations.md says how.

Rank, alpha, kind of variant, start, learning rate and number of examples differ. The oracle is a
run of its own for each member, with torch's AdamW.
"""

from __future__ import annotations

import torch
from models import largest, mlp, trained
from torch import Tensor

import lora_func as lf

KINDS = (
    lf.LoRA(r=1, alpha=3),
    lf.LoRA(r=3, alpha=32, rslora=True),
    lf.PiSSA(r=2),
    lf.LoRA(r=4),
)
RANK = 4  # PiSSA's change has rank 2 r
DECAY = 0.1


def one_run(adapter, model, params, data, *, rate, steps) -> dict[str, Tensor]:
    """AdamW on one adapter alone, on its own examples."""
    leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=rate, weight_decay=DECAY)
    x, y = data
    for _ in range(steps):
        optimizer.zero_grad()
        (adapter(model, leaves, x) - y).square().mean().backward()
        optimizer.step()
    return {key: leaf.detach() for key, leaf in leaves.items()}


def all_at_once(model, adapters, starts, data, *, rates, steps) -> list[dict[str, Tensor]]:
    """One pass and one optimizer for all members, of which each kind has its leaves stacked."""
    leaves = [
        {key: leaf.requires_grad_() for key, leaf in lf.stack(several).items()}
        for several in starts
    ]
    tensors = [leaf for own in leaves for leaf in own.values()]
    own_rates = torch.tensor(rates, dtype=torch.float64).split([len(own) for own in starts])
    shares = [rate[:, None, None] for rate, own in zip(own_rates, leaves) for _ in own]
    counts = torch.tensor([len(x) for x, _ in data])
    ids = torch.arange(len(data)).repeat_interleave(counts)
    x, y = (torch.cat(parts) for parts in zip(*data))
    optimizer = torch.optim.AdamW(tensors, lr=1.0, weight_decay=DECAY)
    for _ in range(steps):
        parts = [lf.as_lora(a, own, r=RANK) for a, own in zip(adapters, leaves)]
        members = {key: torch.cat([part[key] for _, part in parts]) for key in parts[0][1]}
        out = parts[0][0](model, lf.select(members, ids), x)
        losses = (out - y).square().mean(-1)
        optimizer.zero_grad()
        (torch.zeros(len(data)).double().index_add(0, ids, losses) / counts).sum().backward()
        before = [leaf.detach().clone() for leaf in tensors]
        optimizer.step()
        with torch.no_grad():
            for leaf, old, share in zip(tensors, before, shares):
                leaf.copy_(old.lerp(leaf, share))
    return [member for own in leaves for member in lf.unstack(own)]


def compare(members: int, kinds, steps: int) -> None:
    """Trains `members` of each kind in both ways."""
    model = mlp().double()
    targets = lf.Targets(roles=())
    adapters = [lf.adapt(model, kind, targets=targets, dtype=torch.float64)[0] for kind in kinds]
    starts = [[trained(a.init(model)) for _ in range(members)] for a in adapters]
    flat = [(a, start) for a, own in zip(adapters, starts) for start in own]
    counts = [1 + k % 4 for k in range(len(flat))]
    data = [(torch.randn(n, 6).double(), torch.randn(n, 4).double()) for n in counts]
    rates = torch.logspace(-4, -1, len(flat), dtype=torch.float64).tolist()
    together = all_at_once(model, adapters, starts, data, rates=rates, steps=steps)
    for (adapter, start), own, rate, found in zip(flat, data, rates, together, strict=True):
        alone = one_run(adapter, model, start, own, rate=rate, steps=steps)
        assert largest(found, alone) <= 1e-10
        assert largest(found, start) > rate


def test_members_that_differ():
    compare(members=2, kinds=KINDS, steps=12)


def test_two_hundred_and_fifty_six_of_them():
    compare(members=64, kinds=KINDS, steps=3)


def test_a_lower_rank_that_is_filled_up_stays_so():
    """The zeros get a gradient of zero: AdamW, with decay, leaves them to the bit."""
    model = mlp()
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(roles=()))
    adapter, filled = lf.as_lora(adapter, trained(params), r=5)
    leaves = {key: leaf.requires_grad_() for key, leaf in lf.stack([filled] * 3).items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=1e-2, weight_decay=DECAY)
    for _ in range(5):
        optimizer.zero_grad()
        adapter(model, leaves, torch.randn(12, 6), each=4).square().sum().backward()
        optimizer.step()
    for key, leaf in leaves.items():
        axis = 1 if key.endswith("_A") else 2
        own, zeros = leaf.split([2, 3], axis)
        assert torch.equal(zeros, torch.zeros_like(zeros))
        assert not torch.equal(own, filled[key].narrow(axis - 1, 0, 2).expand_as(own))
