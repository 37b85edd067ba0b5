"""What holds the leaves of one target in a view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def marks(tensors: list[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """What differs once one of the tensors is another or has changed, but for a `.data` write."""
    return tuple((t, version(t), t.data_ptr(), t.device, t.dtype) for t in tensors)


def are_current(old: tuple[tuple[Any, ...], ...], new: tuple[tuple[Any, ...], ...]) -> bool:
    """Whether two results of `marks` are of the same tensors in the same state."""
    same = len(old) == len(new)
    return same and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, new))
