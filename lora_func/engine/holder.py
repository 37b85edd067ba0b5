"""What holds the leaves of one target in a view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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
    _weight: Any

    def hold(self, site: Site, params: Mapping[str, Tensor], keep: bool) -> None:
        """Takes the leaves of `site` out of the flat dict. `keep`: for a bound view."""
        for name, (key, _) in site.leaves.items():
            leaf = params[key]
            # What is computed from other tensors is no parameter of a module.
            table = self._parameters if keep and is_parameter(leaf) else self._buffers
            table[f"lora_{name}"] = leaf  # pyright: ignore  (a leaf tensor may be one)
        self.__dict__["_site"] = site

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
        held: dict[str, Any] = {**self._parameters, **self._buffers}
        return {name: held[f"lora_{name}"] for name in self._site.leaves}

    def places(self) -> list[Place]:
        """Where the trainable leaves are."""
        names = [f"lora_{name}" for name in self._site.leaves]
        return [(self._parameters if n in self._parameters else self._buffers, n) for n in names]

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


def version(t: Tensor) -> object:
    """A value that differs after every change of `t` in place."""
    return object() if t.is_inference() else t._version  # inference tensors are not counted


Place = tuple[Mapping[str, Any], str]  # a table of a module, and a name in it


class Note(NamedTuple):
    """A tensor as it was found at a place."""

    table: Mapping[str, Any]
    name: str
    tensor: Tensor | None
    state: tuple[Any, ...]

    def holds(self) -> bool:
        """Whether the tensor is still there and unchanged, but for a write through `.data`."""
        t = self.table.get(self.name)
        return t is self.tensor and state(t) == self.state


def noted(places: list[Place]) -> tuple[Note, ...]:
    """The tensors that are at these places."""
    found = [(table, name, table.get(name)) for table, name in places]
    return tuple(Note(table, name, t, state(t)) for table, name, t in found)


def state(t: Tensor | None) -> tuple[Any, ...]:
    """What differs after a change of `t`."""
    return () if t is None else (version(t), t.data_ptr(), t.device, t.dtype)
