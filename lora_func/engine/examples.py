"""The example axis: functions of one layer, run for each example of a batch.

A leaf with one axis more than its own shape holds an entry for each example. Then the variant's
functions run under a vmap that the model around never sees: it runs once, with its fused
attention and its masks, on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..libraries.functorch import is_batched, over_first_axis
from ..variant import Prepared, Variant, Weight


class Entries(NamedTuple):
    """The parameters of one layer, as its variant takes them."""

    params: dict[str, Tensor]  # plain, or Prepared
    own: tuple[str, ...]  # names of those with an example axis
    dtype: torch.dtype | None  # for which they are prepared; None: for any

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether they are precise enough for an input of `dtype`."""
        return self.dtype in (None, dtype) or torch.promote_types(self.dtype, dtype) == self.dtype


def each(
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    entries: Entries,
    broadcasts: bool = False,
) -> Tensor:
    """`function(*inputs, params)`; with an example axis, of each example by its own entry.

    `broadcasts`: with prepared parameters, the function takes all examples at once, as
    `[n, rows, features]`. What all examples share goes in by closure.
    """
    params, own, _ = entries
    if not own:
        return function(*inputs, params)
    if broadcasts and isinstance(params, Prepared):
        n = params[own[0]].shape[0]
        if all(x.dim() == 3 and x.shape[0] == n for x in inputs):
            return function(*inputs, params)
        rows = (x.unflatten(0, (n, x.shape[0] // n)).flatten(1, -2) for x in inputs)
        out = function(*rows, params)
        return out.reshape(*inputs[-1].shape[:-1], out.shape[-1])

    def of_one(*tensors: Tensor) -> Tensor:
        leaves = dict(zip(own, tensors[len(inputs) :]))
        return function(*tensors[: len(inputs)], type(params)({**params, **leaves}))

    leaves = [params[name] for name in own]
    n = leaves[0].shape[0]
    if inputs[0].shape[0] == n:
        return over_first_axis(of_one, *inputs, *leaves)
    # The rows of an example stand together, as its beams do.
    grouped = (x.unflatten(0, (n, -1)) for x in inputs)
    return over_first_axis(of_one, *grouped, *leaves).flatten(0, 1)


def prepare(variant: Variant, weight: Weight, entries: Entries, dtype: torch.dtype) -> Entries:
    """What the variant prepares, for each example if there is an example axis."""
    params, own, _ = entries
    if not own:
        return Entries(variant.prepared(weight, params, dtype), (), dtype)
    names: list[str] = []
    shared: dict[str, Tensor] = {}

    def of_one(*leaves: Tensor) -> tuple[Tensor, ...]:
        prepared = variant.prepared(weight, {**params, **dict(zip(own, leaves))}, dtype)
        names.clear()
        for name, t in prepared.items():
            if is_batched(t):
                names.append(name)
            else:
                shared[name] = t
        return tuple(prepared[name] for name in names)

    batched = over_first_axis(of_one, *(params[name] for name in own))
    return Entries(Prepared({**shared, **dict(zip(names, batched))}), tuple(names), dtype)
