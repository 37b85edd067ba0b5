"""Whether the tensors of a base are what an adapter takes them for, between calls and in one."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraFuncError
from ..libraries.functorch import in_transform
from ..weights.table import fingerprint
from .sites import Base

ROUNDED = torch.float16  # a cast to it changes the fingerprint, which rounds to bfloat16


def check_written(model: nn.Module, versions: Sequence[tuple[Tensor, int]]) -> None:
    """Raises LoraFuncError if a tensor was written to in place after its version was noted."""
    written = {id(t) for t, version in versions if t._version != version}
    if not written:
        return
    for path, module in model.named_modules():
        kind = type(module).__name__
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if id(t) in written:
                buffer = name in module._buffers
                raise LoraFuncError(
                    f"{kind} {path!r} was called, and its {'buffer' if buffer else 'parameter'} "
                    f"{name!r} was written to in place. A call shares it with the model, so the "
                    "model has changed. Use module = lf.bind(adapted_forward, model, params)"
                    + (", whose buffers are its own" if buffer else " on a copy of the model")
                )


class Drift:
    """Tells when the weights of a base are not those that an adapter was made on.

    This is so after a merge into the base, on which the adapter would act a second time. Versions
    and addresses of the weights, noted at the last call, tell which to look at; fingerprints tell
    whether these differ. A write through `.data` changes no version and is not noticed.
    """

    def __init__(self) -> None:
        # For each model, by path of a layer: what was known of its weight.
        self.known: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]]
        self.known = weakref.WeakKeyDictionary()

    def note(self, model: nn.Module, base: Mapping[str, Base]) -> None:
        """Takes the weights of `model` for those of the adapter, whatever they are."""
        held = {
            path: own.tensor or f"{path}.weight".removeprefix(".") for path, own in base.items()
        }
        self.known[model] = {path: mark(tensor_at(model, held[path])) for path in base}

    def check(
        self,
        model: nn.Module,
        weights: Mapping[str, tuple[Tensor | None, Any]],
        base: Mapping[str, Base],
    ) -> None:
        """Warns if weights in a view of `model` have changed to others than the adapter's.

        `weights`: path of a target -> the tensor that the view has of the model, and its `Weight`.
        """
        if in_transform():
            return
        known = self.known.setdefault(model, {})
        changed = {}
        for path, (stored, weight) in weights.items():
            now, before = mark(stored), known.get(path)
            if now != before:
                known[path] = now
                if now is not None and now[0] == (before or now)[0] and now[0] != ROUNDED:
                    changed[path] = weight
        for path, weight in changed.items():
            if weight.at_hand and fingerprint(weight) != base[path].fingerprint:
                warnings.warn(
                    f"the weight of {path!r} is not the one on which the adapter was made. If an "
                    "adapter was merged into the model, this call applies it a second time: run "
                    "the merged model itself, or load the base again",
                    stacklevel=4,
                )
                return

    def __reduce__(self) -> tuple[Any, ...]:
        return Drift, ()


def tensor_at(model: nn.Module, path: str) -> Tensor | None:
    """The parameter of a model at a path, or None."""
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner)._parameters.get(name)


def mark(weight: Tensor | None) -> tuple[Any, ...] | None:
    """What differs after most changes of a weight; None for one that is packed."""
    if weight is None or type(weight) not in (Tensor, nn.Parameter):
        return None
    if weight.is_meta or weight.is_inference():
        return None
    return weight.dtype, weight._version, weight.data_ptr()
