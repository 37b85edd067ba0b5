"""Equal layers prepare together: with their leaves stacked, `prepare` runs once for all of them.

It runs under vmap, with a layer in the place of an example. Layer by layer, a model would ask its
GPU for thousands of kernels on a few numbers each before it has its first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..libraries.functorch import (
    applied,
    batched,
    in_transform,
    is_batched_here,
    on_all,
    over_first_axis,
)
from ..variant import Prepared, Variant, Weight
from .examples import Entries, prepare

FEWEST = 4
"""Layers for which it pays: vmap and the stacks take as long as three layers do by themselves."""
MOST = 2**24
"""Entries of leaves that are stacked at a time, 64 MiB in float32."""


def kind_of(weight: Any, entries: Entries, shared: frozenset[str]) -> tuple[object, ...]:
    """What is equal for layers that can prepare together."""
    leaves = tuple(
        (name, id(t) if name in shared else (t.shape, t.dtype, t.device, t.requires_grad))
        for name, t in entries.params.items()
    )
    return type(weight), weight.shape, weight.input_dtype, weight.bias is None, entries.own, leaves


def fitting(entries: Entries, shared: frozenset[str]) -> int:
    """How many layers like this one may be stacked at a time."""
    own = sum(t.numel() for name, t in entries.params.items() if name not in shared)
    return max(1, MOST // max(own, 1))


def prepare_together(
    variant: Variant,
    weights: Sequence[Weight],
    entries: Sequence[Entries],
    shared: frozenset[str],
    dtype: torch.dtype,
) -> list[Entries]:
    """What the variant prepares for each of some layers of one kind.

    `shared`: the names of what all of them share.
    """
    first, used = entries[0], set[int]()  # used: layers that got a gradient, in a backward pass
    own = tuple(name for name in first.params if name not in shared)
    stacks = {name: t for name, t in first.params.items() if name in shared}
    for name in own:
        stack = stacked([each.params[name] for each in entries], used)  # [layers, ..]
        stacks[name] = stack.movedim(0, 1) if name in first.own else stack
    together: Any = Together(variant, own)
    made = prepare(together, WeightOfEach(weights), Entries(stacks, first.own, None), dtype)
    apart = {
        name: [t] * len(entries)
        if name in together.alike
        else unstacked(t, used, 1 if name in made.own else 0)
        for name, t in made.params.items()
    }
    return [
        Entries(Prepared({name: ts[k] for name, ts in apart.items()}), made.own, dtype)
        for k in range(len(entries))
    ]


class Together:
    """A variant that prepares stacked leaves."""

    def __init__(self, variant: Variant, names: tuple[str, ...]):
        self.variant = variant
        self.names = names  # of the leaves that have an axis of layers in front
        self.alike: set[str] = set()  # names of what turned out to be the same for all layers

    def prepared(
        self, weight: WeightOfEach, params: dict[str, Tensor], dtype: torch.dtype
    ) -> Prepared:
        """What `Variant.prepared` returns, with an axis of layers in front."""
        found: list[str] = []
        alike: dict[str, Tensor] = {}

        def of_one(*leaves: Tensor) -> tuple[Tensor, ...]:
            one = {**params, **dict(zip(self.names, leaves))}
            prepared = self.variant.prepared(weight, one, dtype)
            for name, t in prepared.items():
                if is_batched_here(t):
                    found.append(name)
                else:
                    alike[name] = t
            return tuple(prepared[name] for name in found)

        made = over_first_axis(of_one, *(params[name] for name in self.names))
        self.alike = set(alike)
        return Prepared({**alike, **dict(zip(found, made))})


class WeightOfEach(Weight):
    """The weights of some layers, as the one weight that `prepare` sees under vmap over them."""

    def __init__(self, weights: Sequence[Any]):
        self.weights = weights

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights[0].shape

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore  (an attribute of a plain Weight)
        biases = [weight.bias for weight in self.weights]
        return None if biases[0] is None else batched(torch.stack(biases))

    def __call__(self, z: Tensor) -> Tensor:
        first = self.weights[0]
        dtype = z.dtype if first.opaque else first.input_dtype  # all at once, not each by itself

        def products(rows: Tensor) -> Tensor:
            pairs = zip(self.weights, rows.to(dtype).unbind(0))
            return torch.stack([weight(row) for weight, row in pairs]).to(z.dtype)

        return on_all(products, z, len(self.weights))

    def dense(self) -> Tensor:
        raise NotImplementedError  # all matrices at once: who needs them prepares alone


def stacked(tensors: list[Tensor], used: set[int]) -> Tensor:
    """The tensors along a new first axis. In backward, none but those of `used` has a gradient."""
    plain = in_transform() or not (torch.is_grad_enabled() and tensors[0].requires_grad)
    return torch.stack(tensors) if plain else applied(Stack, used, *tensors)


def unstacked(t: Tensor, used: set[int], axis: int) -> Sequence[Tensor]:
    """The tensors along an axis. In backward, `used` learns which of them got a gradient."""
    plain = in_transform() or not (torch.is_grad_enabled() and t.requires_grad)
    return t.unbind(axis) if plain else applied(Unstack, used, axis, t)


class Stack(torch.autograd.Function):
    """`stacked` for autograd: a layer that the model does not use has no gradient, not zeros."""

    @staticmethod
    def forward(ctx: Any, used: set[int], *tensors: Tensor):  # pyright: ignore
        ctx.used = used
        return torch.stack(tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore
        return None, *(g if k in ctx.used else None for k, g in enumerate(grad.unbind(0)))


class Unstack(torch.autograd.Function):
    """`unstacked` for autograd."""

    @staticmethod
    def forward(ctx: Any, used: set[int], axis: int, t: Tensor):  # pyright: ignore
        ctx.set_materialize_grads(False)
        ctx.used, ctx.axis = used, axis
        return t.unbind(axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):  # pyright: ignore
        there = [grad for grad in grads if grad is not None]
        if not there:
            return None, None, None
        ctx.used.update(k for k, grad in enumerate(grads) if grad is not None)
        rows = [torch.zeros_like(there[0]) if grad is None else grad for grad in grads]
        return None, None, torch.stack(rows, ctx.axis)
