"""Stacks of matrices, such as fused experts: a variant's functions, run for each matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..libraries.functorch import over_first_axis
from ..variant import Params, Variant, Weight


def is_stack(weight: Weight) -> bool:
    """Whether a weight is a stack `[E, d_out, d_in]`."""
    return len(weight.shape) == 3


def first(weight: Weight) -> Weight:
    """The first matrix of a stack; a weight that is no stack itself."""
    return Weight(weight.dense()[0]) if is_stack(weight) else weight


def init(variant: Variant, weight: Weight, generator: torch.Generator | None, stats: Any) -> Params:
    """`variant.init`; of a stack, of each matrix in turn, with the leaves stacked `[E, ..]`."""
    if not is_stack(weight):
        return variant.init(weight, generator, stats)
    drawn = [variant.init(Weight(W), generator) for W in weight.dense()]
    return Params(
        {name: torch.stack([p.trainable[name] for p in drawn]) for name in drawn[0].trainable},
        {name: torch.stack([p.frozen[name] for p in drawn]) for name in drawn[0].frozen},
    )


def like(variant: Variant, weight: Weight, leaves: Mapping[str, Tensor]) -> Params:
    """`variant.like`; of a stack, with the leaves of one matrix repeated `[E, ..]`."""
    if not is_stack(weight):
        return variant.like(weight, leaves)
    one = variant.like(first(weight), {name: leaf[0] for name, leaf in leaves.items()})
    E = weight.shape[0]
    return Params(
        {name: leaf.expand(E, *leaf.shape) for name, leaf in one.trainable.items()},
        {name: leaf.expand(E, *leaf.shape) for name, leaf in one.frozen.items()},
    )


def rebuild(variant: Variant, weight: Weight, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`variant.rebuild`; of a stack, of each matrix in turn, with the results stacked."""
    if not is_stack(weight):
        return variant.rebuild(weight, leaves)
    built = [
        variant.rebuild(Weight(W), {name: leaf[e] for name, leaf in leaves.items()})
        for e, W in enumerate(weight.dense())
    ]
    return {name: torch.stack([one[name] for one in built]) for name in built[0]}


def over(
    function: Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, ...]],
    W: Tensor,
    params: dict[str, Tensor],
    shared: frozenset[str],
) -> tuple[Tensor, ...]:
    """`function(W, params)`; for a stack W, of each matrix with its own entry of `params`.

    `shared` are the names of those that have no axis for the stack.
    """
    if W.dim() != 3:
        return function(W, params)
    own = [name for name in params if name not in shared]
    rest = {name: params[name] for name in shared}

    def of_one(W: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return function(W, {**rest, **dict(zip(own, leaves))})

    return over_first_axis(of_one, W, *(params[name] for name in own))
