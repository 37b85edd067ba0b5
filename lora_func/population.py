"""Many adapters in one dict: leaves with one leading axis, the *example axis*.

If a leaf has one axis more than its own shape, example i of the batch runs through entry i of the
leaf, in one pass of the base model. These four functions make and take apart such dicts. They are
plain tensor code: differentiable, and usable under every transform. All leaves of the dict get, or
have, the axis. To share some leaves among the examples, treat the others alone:
`{**shared, **lf.stack(own)}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import LoraFuncError, listing


def stack(adapters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """K dicts of one Adapter as one dict of leaves `[K, *shape]`, from which `select` picks.

    Gradients flow to each adapter's own leaves, so K parameter groups of a stock optimizer train K
    adapters in one pass. The leaves are copied: memory limits K, not speed.

    Raises:
        LoraFuncError: no dict; dicts that differ in keys, shapes or dtypes, as those of different
            variants do.
    """
    adapters = list(adapters)
    if not adapters or not all(isinstance(params, Mapping) for params in adapters):
        given = "nothing" if not adapters else f"a list of {type(adapters[0]).__name__}"
        raise LoraFuncError(f"stack takes a list of at least one dict of parameters, not {given}")
    first = adapters[0]
    for k, params in enumerate(adapters):
        if params.keys() != first.keys():
            differing = sorted(params.keys() ^ first.keys())
            raise LoraFuncError(
                f"adapter {k} and adapter 0 differ in the keys {listing(differing)}: only "
                "parameters of one Adapter can be stacked. Run adapters of different variants one "
                "after the other"
            )
        for key, leaf in params.items():
            other = first[key]
            if leaf.shape != other.shape or leaf.dtype != other.dtype:
                raise LoraFuncError(
                    f"{key!r} is {leaf.dtype} of shape {tuple(leaf.shape)} in adapter {k}, and "
                    f"{other.dtype} of shape {tuple(other.shape)} in adapter 0: only parameters of "
                    "one Adapter can be stacked"
                )
    return {key: torch.stack([params[key] for params in adapters]) for key in first}


def unstack(params: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The inverse of `stack`: K dicts, whose leaves are views of those of `params`.

    Raises LoraFuncError if the leaves have no common axis.
    """
    return [{key: leaf[k] for key, leaf in params.items()} for k in range(size(params))]


def select(params: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Leaves `[n, *shape]` for n examples: example i runs through adapter `ids[i]`.

    A gather: an adapter may be picked any number of times, and its gradient is then the sum over
    its examples. It is copied as often. If all adapters have m examples each, one after the other,
    `adapted_forward(model, params, batch, each=m)` gives the same without a copy.

    Args:
        params: a population, as `stack` makes it.
        ids: int64 `[n]`, on any device, each in 0 .. K-1. (On a GPU a larger one fails later, in
            the kernel.)

    Raises:
        LoraFuncError: ids of another dtype or shape, or out of range; leaves without a common axis.
    """
    K = size(params)
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
        tensor = isinstance(ids, Tensor)
        given = f"{ids.dtype} of shape {tuple(ids.shape)}" if tensor else repr(ids)
        raise LoraFuncError(
            "ids must be an int64 tensor of shape [examples], such as torch.tensor([0, 0, 2]), not "
            f"{given}"
        )
    try:
        return {key: leaf.index_select(0, ids.to(leaf.device)) for key, leaf in params.items()}
    except IndexError as error:
        raise LoraFuncError(f"ids out of range: {ids.tolist()} for a population of {K}") from error


def expand(params: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """Leaves `[n, *shape]` that repeat one adapter for n examples, without copying it.

    For per-sample gradients: with respect to the expanded leaves, the gradient of a loss that is a
    sum over the examples is the gradient of each example,
    `lf.value_and_grad(summed_loss)(lf.expand(params, n))[1]`.

    Raises LoraFuncError unless n is an integer of at least 1.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise LoraFuncError(
            f"n must be the number of examples, an integer of at least 1, not {n!r}"
        )
    return {key: leaf.expand(n, *leaf.shape) for key, leaf in params.items()}


def size(params: Mapping[str, Tensor]) -> int:
    """K, the length of the axis that all leaves share. Raises LoraFuncError if they share none."""
    sizes = {key: leaf.shape[0] if leaf.dim() else None for key, leaf in params.items()}
    if len(set(sizes.values())) != 1 or None in sizes.values():
        shapes = ", ".join(f"{key!r} {tuple(params[key].shape)}" for key in list(sizes)[:4])
        raise LoraFuncError(
            f"these leaves do not share a leading axis: {shapes or 'there is none'}. lf.stack "
            "makes one"
        )
    return next(size for size in sizes.values() if size is not None)
