"""Training of one adapter, or of several with different learning rates in one pass of the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import lora_func as lf

from .answers import nats

Batch = dict[str, Tensor]
POINTS = 5
"""How often the loss on held-out examples is measured, before and after training included."""


class Trained(NamedTuple):
    """The parameters of each member, and the losses of all: one number for each member."""

    members: list[dict[str, Tensor]]
    losses: list[list[float]]  # of each step, on its batch
    held_out: list[tuple[int, list[float]]]  # after how many steps, on the held-out examples


def rates_around(lr: float, count: int) -> list[float]:
    """`count` learning rates, half a decade apart, with `lr` in the middle."""
    return [lr * 10 ** ((i - count // 2) / 2) for i in range(count)]


def train(
    adapter: lf.Adapter,
    model: Any,
    params: dict[str, Tensor],
    rates: Sequence[float],
    *,
    batches: Sequence[Callable[[], Batch]],
    held_out: Sequence[Batch],
) -> Trained:
    """Trains a member for each learning rate. All start alike, and see the same batches.

    AdamW without decay; each rate warms up in a tenth of the steps, then follows a cosine to zero.
    """
    members = [{key: leaf.clone().requires_grad_() for key, leaf in params.items()} for _ in rates]
    optimizer = torch.optim.AdamW(
        [{"params": list(own.values()), "lr": lr} for own, lr in zip(members, rates)],
        weight_decay=0.0,
    )
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share(step, steps))
    measured = {round(i * steps / (POINTS - 1)) for i in range(POINTS)}
    losses, curve = [], [(0, evaluate(adapter, model, members, held_out))]
    progress = tqdm(range(1, steps + 1), desc="training", unit="step")
    for step in progress:
        each = of_members(adapter, model, members, batches[step - 1]()).mean(1)
        optimizer.zero_grad()
        each.sum().backward()  # the sum keeps the gradients of the members apart
        optimizer.step()
        schedule.step()
        losses.append(each.tolist())
        if step in measured:
            curve.append((step, evaluate(adapter, model, members, held_out)))
        progress.set_postfix(held_out=f"{curve[-1][1][len(rates) // 2]:.3f}")
    trained = [{key: leaf.detach() for key, leaf in own.items()} for own in members]
    return Trained(trained, losses, curve)


def share(step: int, steps: int) -> float:
    """Of the learning rate, in step 0, 1, ..: a tenth warm-up, then a cosine to zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def of_members(
    adapter: lf.Adapter, model: Any, members: list[dict[str, Tensor]], batch: Batch
) -> Tensor:
    """The loss of each token of the answers, `[members, tokens]`, in one pass of the base."""
    if len(members) == 1:
        return nats(adapter, model, members[0], batch)
    return nats(adapter, model, lf.stack(members), batch, len(members))


@torch.no_grad()
def evaluate(
    adapter: lf.Adapter, model: Any, members: list[dict[str, Tensor]], batches: Sequence[Batch]
) -> list[float]:
    """The loss of each member, in nats for a token of an answer."""
    every = [of_members(adapter, model, members, batch) for batch in batches]
    return torch.cat(every, dim=1).mean(1).tolist()
