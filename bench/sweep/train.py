"""Training many members in one pass: leaves with a leading member axis, and their own AdamW.

Each member has its own learning rate, its own data and its own optimizer state. A member's loss
does not depend on another's leaves, so each ends where it would end alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import lora_func as lf

from . import files
from .data import Problem, batch, orders
from .model import Answers

BETAS, EPS = (0.9, 0.999), 1e-8


class OutOfTime(Exception):
    """The budget is used up. What was done is saved."""


class Population:
    """K members: their leaves, which are views of one `[K, P]`, and AdamW on it.

    torch's AdamW has one learning rate for a tensor. This one has one for each row.
    """

    def __init__(
        self, starts: Sequence[Mapping[str, Tensor]], lrs: Tensor, scale: Mapping[str, float]
    ):
        self.shapes = {key: leaf.shape for key, leaf in starts[0].items()}
        rows = [torch.cat([leaf.flatten() for leaf in start.values()]) for start in starts]
        self.flat = torch.stack(rows)
        self.m, self.v = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.lrs = lrs.to(self.flat)[:, None]  # [K, 1]
        scales = {scale.get(key, 1.0) for key in self.shapes}
        if scales != {1.0}:  # LoRA+
            own = [torch.full((s.numel(),), scale[key]) for key, s in self.shapes.items()]
            self.lrs = self.lrs * torch.cat(own).to(self.flat)
        self.alive = torch.ones(len(rows), dtype=torch.bool, device=self.flat.device)
        self.leaves = self.named(self.flat)
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """The flat dict of leaves `[K, *shape]`, as views of `[K, P]`."""
        parts = flat.detach().split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {
            key: part.view(len(flat), *shape)
            for (key, shape), part in zip(self.shapes.items(), parts)
        }

    def gradient(self, loss: Tensor) -> Tensor:
        """Of a sum of the members' losses, `[K, P]`."""
        grads = torch.autograd.grad(loss, list(self.leaves.values()))
        return torch.cat([grad.reshape(len(grad), -1) for grad in grads], dim=1)

    @torch.no_grad()
    def update(self, step: int, factor: float, losses: Tensor, grad: Tensor) -> None:
        """One step of AdamW without decay, of the rate `factor * lr`.

        A member whose loss or update is not finite has diverged: it is zeroed and moves no more.
        """
        b1, b2 = BETAS
        self.m.lerp_(grad, 1 - b1)
        self.v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        update = self.v.sqrt().div_(math.sqrt(1 - b2**step)).add_(EPS).reciprocal_()
        update.mul_(self.m).mul_(self.lrs).mul_(factor / (1 - b1**step))
        self.alive &= losses.isfinite() & update.isfinite().all(1)
        self.flat.sub_(update).masked_fill_(~self.alive[:, None], 0.0)

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        return {"flat": self.flat, "m": self.m, "v": self.v, "alive": self.alive}


def factor(step: int, steps: int) -> float:
    """Of the learning rate in step 0, 1, ..: a tenth warm-up, then a cosine to zero."""
    warm = max(1, steps // 10)
    rest = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    return (step + 1) / warm if step < warm else rest


@dataclass
class Pass:
    """Members to train together: learning rates x seeds, the learning rate being the slower."""

    adapter: lf.Adapter
    starts: list[dict[str, Tensor]]  # of each seed
    lrs: tuple[float, ...]
    problems: list[Problem]
    steps: int
    batch: int
    state: Path  # where to save
    save_s: float = 120.0
    in_time: Callable[[], bool] = field(default=lambda: True)

    @property
    def members(self) -> list[tuple[float, int]]:
        """(learning rate, seed) of each."""
        return [(lr, seed) for lr in self.lrs for seed in range(len(self.starts))]


@dataclass
class Trained:
    """What a pass returns."""

    population: Population
    curves: Tensor  # [steps, K]
    seconds: float
    peak_bytes: int


def train(base: Answers, job: Pass) -> Trained:
    """Trains all members of a pass, from its saved state if there is one.

    Raises OutOfTime, after saving the state, when the time is over.
    """
    device = next(base.parameters()).device
    seeds, members = len(job.starts), job.members
    lrs = torch.tensor([lr for lr, _ in members], dtype=torch.float64)
    starts = [job.starts[seed] for _, seed in members]
    population = Population(starts, lrs, job.adapter.lr_scale)
    of_member = [seed for _, seed in members]
    plan = orders([len(p.tokens) for p in job.problems], job.steps, job.batch, seeds)
    curves: list[Tensor] = []
    first, before = 0, 0.0
    if job.state.exists():
        saved = files.load_state(job.state, device)
        for name, tensor in population.state().items():
            tensor.copy_(saved[name])
        curves, before = list(saved["curves"]), float(saved["seconds"])
        first = len(curves)
    reset_peak(device)
    started = saved_at = time.monotonic()

    def save() -> None:
        seconds = torch.tensor(before + time.monotonic() - started)
        state = {**population.state(), "curves": torch.stack(curves), "seconds": seconds}
        files.save_state(job.state, state)

    progress = tqdm(
        range(first, job.steps), initial=first, total=job.steps, leave=False, unit="step"
    )
    for step in progress:
        rows = [[job.problems[i] for i in plan[seed, step].tolist()] for seed in range(seeds)]
        nll = job.adapter(base, population.leaves, batch(rows, of_member, device)).nll
        tokens = [sum(len(p.tokens) - p.start for p in row) for row in rows]
        losses = nll.sum(1) / torch.tensor(tokens)[of_member].to(device, non_blocking=True)  # [K]
        grad = population.gradient(losses.sum())
        losses = losses.detach()
        population.update(step + 1, factor(step, job.steps), losses, grad)
        curves.append(losses)
        if step % 8 == 7:
            progress.set_postfix(loss=f"{losses.nanmedian().item():.3f}")  # and waits for the GPU
        if not job.in_time():
            save()
            raise OutOfTime
        if time.monotonic() - saved_at >= job.save_s:
            save()
            saved_at = time.monotonic()
    curve = torch.stack(curves).cpu()
    return Trained(population, curve, before + time.monotonic() - started, peak(device))


def reset_peak(device: torch.device) -> None:
    """Begins to measure the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> int:
    """Bytes allocated at the peak; 0 on a CPU, which does not count them."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
