"""`RankAllocator`: AdaLoRA's ranks, allocated while a training runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .engine.adapter import Adapter
from .engine.keys import by_path
from .errors import LoraFuncError, listing, near_misses


@dataclass(frozen=True, kw_only=True)
class RankAllocator:
    """Takes the least important triplets of AdaLoRA away. Zhang et al. 2023 (arXiv 2303.10512).

    After each backward pass and optimizer step of the training:

        state = allocator.init(adapter, params)
        state, params = allocator.step(state, params, grads, number_of_the_step)

    The importance of an entry is the product of two moving averages, of its sensitivity |p g| and
    of how much that changes (equations 9 to 11). That of a triplet is the importance of E_i plus
    the means over A_i and over B_i (equation 8). The budget, the number of triplets in all layers,
    falls by a cubic schedule (equation 12); triplets beyond it get E_i = 0, and may come back while
    the schedule runs, because their gradients go on.
    """

    target_r: int = 8
    """Mean rank of a layer at the end, at least 1."""
    warmup: int = 0
    """Steps before the first allocation, at least 0 (t_i in equation 12)."""
    final: int = 0
    """Steps at the end in which the ranks stay, at least 0 (t_f in equation 12)."""
    total: int
    """Steps of the training, more than `warmup` and `final` together (T in equation 12)."""
    interval: int = 1
    """Steps between two allocations, at least 1."""
    beta1: float = 0.85
    """β1, the decay of the average of the sensitivities: between 0 and 1."""
    beta2: float = 0.85
    """β2, the decay of the average of their changes: between 0 and 1."""

    def __post_init__(self):
        for name, least in (("target_r", 1), ("warmup", 0), ("final", 0), ("interval", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise LoraFuncError(f"{name}={value!r}; expected an integer of at least {least}")
        if type(self.total) is not int or self.total <= self.warmup + self.final:
            raise LoraFuncError(
                f"total={self.total!r}; expected more steps than warmup={self.warmup} and "
                f"final={self.final} together"
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise LoraFuncError(f"{name}={getattr(self, name)!r}; expected a number in (0, 1)")

    def init(self, adapter: Adapter, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state before any step: flat key -> both averages `[2, ..]`, for AdaLoRA's leaves.

        Raises LoraFuncError if the adapter has none, or one within a chain.
        """
        variants = adapter.variants.items()
        has = [path for path, v in variants if any(p.name() == "adalora" for p in v.parts())]
        if chained := [path for path in has if adapter.variants[path].name() != "adalora"]:
            raise LoraFuncError(
                f"{listing(chained)} has an AdaLoRA within a Chain, whose ranks RankAllocator does "
                "not allocate: use AdaLoRA alone there"
            )
        keys = [
            key
            for path, variant in variants
            if variant.name() == "adalora"
            for key in adapter.keys_of(path)
        ]
        if not keys:
            kinds = {type(variant).__name__ for variant in adapter.variants.values()}
            raise LoraFuncError(f"RankAllocator allocates AdaLoRA's ranks, not those of {kinds}")
        return {key: torch.zeros(2, *params[key].shape).to(params[key]) for key in keys}

    def budget(self, step: int, start: int, layers: int) -> int:
        """The number of triplets to keep at a step, of `start` in so many layers."""
        end = self.target_r * layers
        if step <= self.warmup:
            return start
        if step > self.total - self.final:
            return end
        rest = 1 - (step - self.warmup) / (self.total - self.final - self.warmup)
        return int((start - end) * rest**3 + end)

    @torch.no_grad()
    def step(
        self,
        state: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        step: int,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The next state, and params in which the triplets beyond the budget have E = 0.

        Pure: nothing is written in place. To go on with the same tensors, copy E back,
        `leaves[key].data.copy_(params[key])`.

        Args:
            state: from `init` or the last step.
            params: flat key -> tensor, after the optimizer's step.
            grads: flat key -> gradient.
            step: the number of this step, from 0.

        Raises:
            LoraFuncError: grads that lack a key.
        """
        if lacking := [key for key in state if key not in grads or key not in params]:
            raise LoraFuncError(
                f"params or grads have no {lacking[0]!r}.{near_misses(lacking[0], grads)}"
            )
        if step < self.total - self.final:
            state = {key: self.averaged(old, params[key], grads[key]) for key, old in state.items()}
        triplets = {
            path: {name: key for name, (key, _) in own.items()}
            for path, own in by_path(state).items()
        }
        start = sum(state[keys["E"]].shape[-1] for keys in triplets.values())
        keep = self.budget(step, start, len(triplets))
        frozen = self.warmup < step <= self.total - self.final and step % self.interval
        if step <= self.warmup or frozen or keep >= start:
            return dict(state), dict(params)
        scores = {keys["E"]: importance(state, keys) for keys in triplets.values()}
        threshold = torch.cat(list(scores.values())).kthvalue(start - keep).values
        kept = {
            key: params[key].masked_fill(score <= threshold, 0.0) for key, score in scores.items()
        }
        return dict(state), {**params, **kept}

    def averaged(self, old: Tensor, leaf: Tensor, grad: Tensor) -> Tensor:
        """Both averages of one leaf, a step later."""
        sensitivity, change = old
        now = (leaf * grad).abs()
        sensitivity = self.beta1 * sensitivity + (1 - self.beta1) * now
        change = self.beta2 * change + (1 - self.beta2) * (now - sensitivity).abs()
        return torch.stack([sensitivity, change])


def importance(state: Mapping[str, Tensor], keys: Mapping[str, str]) -> Tensor:
    """The importance `[r]` of the triplets of one layer."""
    A, B, E = (state[keys[name]].prod(0) for name in ("A", "B", "E"))
    return E + A.mean(1) + B.mean(0)
