"""What holds the leaves of one target in a view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..libraries.functorch import in_transform
from .examples import Entries
from .sites import Site


class Holder(nn.Module):
    """A module of a view with the trainable leaves of a target as attributes `lora_<name>`.

    So the keys of the flat dict are paths in the view. In a bound view the leaves are parameters,
    the very tensors of the flat dict; in a call they are buffers, so that a model which asks for
    the dtype of its first parameter gets the same answer as without adapter.
    """

    _site: Site  # underscored: other attributes are those of a layer
    _names: list[str]  # of the trainable leaves, in their order
    _weight: Any

    def hold(self, site: Site, params: Mapping[str, Tensor], keep: bool) -> None:
        """Takes the leaves of `site` out of the flat dict. `keep`: for a bound view."""
        for name, (key, _) in site.leaves.items():
            leaf = params[key]
            # What is computed from other tensors is no parameter of a module.
            table = self._parameters if keep and is_parameter(leaf) else self._buffers
            table[f"lora_{name}"] = leaf  # pyright: ignore  (a leaf tensor may be one)
        self.__dict__["_site"] = site
        self.__dict__["_names"] = [f"lora_{name}" for name in site.leaves]

    @property
    def place(self) -> str:
        """The path of the module that has the tensor of the base."""
        return self._site.path

    @property
    def stored(self) -> Tensor | None:
        """The tensor of the base that the target adapts; None if its layer computes it."""
        raise NotImplementedError  # abstract: a layer and a parameter hold it in other places

    def leaves(self) -> dict[str, Tensor]:
        """The trainable leaves, by short name."""
        return {name: table[key] for name, (table, key) in zip(self._site.leaves, self.places())}

    def places(self) -> list[Place]:
        """Where the trainable leaves are."""
        own, others = self._parameters, self._buffers
        return [(own if name in own else others, name) for name in self._names]

    def plain(self) -> Entries:
        """The parameters as they are now."""
        return entries_of(self._site, self.leaves())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def entries_of(site: Site, leaves: dict[str, Tensor]) -> Entries:
    """Leaves and constants of a target, as its variant takes them."""
    own = [n for n, (_, axes) in site.leaves.items() if leaves[n].dim() > axes]
    return Entries({**leaves, **site.frozen}, tuple(own), None)


def is_parameter(leaf: Tensor) -> bool:
    """Whether a leaf can be a parameter of a module."""
    return not in_transform() and leaf.is_leaf


Place = tuple[Mapping[str, Any], str]  # a table of a module, and a name in it


class Note(NamedTuple):
    """A tensor as it was found at a place."""

    table: Mapping[str, Any]
    name: str
    tensor: Tensor | None
    version: int | None = None  # the number of its changes in place; inference tensors have none
    address: int = 0  # of its memory, on whatever device
    dtype: torch.dtype | None = None


def noted(places: Iterable[Place]) -> list[Note]:
    """The tensors that are at these places."""
    notes = []
    for table, name in places:
        t = table.get(name)
        if t is None:
            notes.append(Note(table, name, None))
        else:
            version = None if t.is_inference() else t._version
            notes.append(Note(table, name, t, version, t.data_ptr(), t.dtype))
    return notes


def unchanged(notes: Iterable[Note]) -> bool:
    """Whether the tensors are still there, and the same but for writes through `.data`.

    A decoded token asks it of each layer, so it calls nothing that it can do without.
    """
    for table, name, tensor, version, address, dtype in notes:
        t = table.get(name)
        if t is not tensor:
            return False
        if t is not None and (
            version is None or t._version != version or t.data_ptr() != address or t.dtype != dtype
        ):
            return False
    return True
