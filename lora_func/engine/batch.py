"""From a batch to the arguments of a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraFuncError, listing

NOT_A_BATCH = (str, bytes, bool, int, float, set, frozenset, Iterator)


def call_arguments(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """`(args, kwargs)` for the model. Raises LoraFuncError for what cannot be a batch."""
    if isinstance(batch, Mapping):
        if not all(isinstance(name, str) for name in batch):
            raise LoraFuncError(
                "a mapping batch becomes keyword arguments, so its keys must be strings, not "
                f"{list(batch)!r}"
            )
        return (), batch
    if isinstance(batch, (tuple, list)):
        return batch, {}
    if batch is None or isinstance(batch, NOT_A_BATCH):
        raise LoraFuncError(
            f"batch is {type(batch).__name__}; expected a mapping of keyword arguments such as "
            "{'input_ids': ids}, a tuple or list of positional ones, or the one argument of the "
            "model, such as a tensor"
        )
    return (batch,), {}


def check_active(active: Any, parameters: Sequence[str]) -> None:
    """Raises LoraFuncError for what does not say on which tokens an adapter acts.

    `parameters`: paths of those that it adapts. They see no tokens.
    """
    if not isinstance(active, Tensor) or active.dtype != torch.bool:
        given = repr(active)
        if isinstance(active, Tensor):
            given = f"{active.dtype} of shape {tuple(active.shape)}"
        raise LoraFuncError(f"active must be a bool tensor [batch, tokens], not {given}")
    if parameters:
        raise LoraFuncError(
            f"active= was given, and the adapter acts on the parameters {listing(parameters)}, "
            "which see no tokens: leave them out of the targets"
        )


def check_each(
    each: Any,
    params: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    parameters: Sequence[str],
) -> None:
    """Raises LoraFuncError for what is no number of examples, or has no example axis to go with.

    `parameters`: paths of those that the adapter changes.
    """
    if isinstance(each, bool) or not isinstance(each, int) or each < 1:
        raise LoraFuncError(
            "each must be the number of examples that an entry of the example axis serves, an "
            f"integer of at least 1, not {each!r}"
        )
    if all(params[key].dim() == len(shape) for key, shape in shapes.items()):
        raise LoraFuncError(f"each={each} was given, and params have no example axis: see lf.stack")
    if parameters:
        raise LoraFuncError(
            f"each= was given, and the adapter acts on the parameters {listing(parameters)}, "
            "which do not count examples: write lf.select(params, ids), with an id for each example"
        )


def check_no_mask(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raises LoraFuncError for `active` among the arguments of a model that has no such argument.

    Many models take any argument and ignore it: the adapter would then act on all tokens.
    """
    if "active" in kwargs and "active" not in inspect.signature(model.forward).parameters:
        raise LoraFuncError(
            f"{type(model).__name__} has no argument `active`. It stands beside the batch, as in "
            "adapted_forward(model, params, batch, active=mask); a bound module acts on all tokens"
        )
