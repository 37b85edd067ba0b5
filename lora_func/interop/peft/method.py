"""What is known of a method in PEFT's format, declared once: `load` and `save` read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ...variant import Variant

Convert = Callable[[Tensor], Tensor]


def same(t: Tensor) -> Tensor:
    """t."""
    return t


class Leaf(NamedTuple):
    """How PEFT's file holds a leaf.

    Leaves with one key are one tensor there, one above the other.
    """

    key: str  # below the path of the layer, such as "lora_A.weight"
    theirs: Convert = same  # our leaf -> PEFT's tensor
    ours: Convert = same  # the inverse


class Folder(NamedTuple):
    """What a method's own functions see of a folder."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]  # of one layer, by the part of the key below its path
    path: str
    shape: tuple[int, ...]  # (d_out, d_in) of the layer


@dataclass(frozen=True, kw_only=True)
class Method:
    """A variant and the method that PEFT calls `peft_type`."""

    peft_type: str
    kind: type[Variant]
    when: Mapping[str, Any] = field(default_factory=dict)
    """PEFT's field -> the value, or a tuple of the values, with which it is this variant. The first
    is what a file without the field means, and what `save` writes."""
    layers: Callable[[Mapping[str, Any], str], bool] = lambda config, path: True
    """Whether, by the config, the layer at a path has this variant."""
    accepts: Callable[[Any], bool] = lambda variant: True  # whether a variant has this form in PEFT
    refusal: str = ""  # why others have not

    fields: Mapping[str, str] = field(default_factory=dict)  # our field -> PEFT's
    defaults: Mapping[str, Any] = field(default_factory=dict)  # PEFT's field -> its value if absent
    patterns: Mapping[str, str] = field(default_factory=dict)
    """PEFT's field -> the one that holds its exceptions, name of a layer -> value."""
    anchored: bool = True  # whether a key of an exception also matches a path without a dot
    read: Callable[[Folder], Mapping[str, Any]] = lambda folder: {}  # our fields that need more
    write: Callable[[Any, dict[str, Tensor]], Mapping[str, Any]] = lambda variant, leaves: {}
    """PEFT's fields that need more, of a variant and its leaves."""
    dropout: str | None = None  # PEFT's field of a dropout of the input
    idle: tuple[str, ...] = ()  # PEFT's fields that matter only to a fresh or a training adapter

    leaves: Mapping[str, Leaf] = field(default_factory=dict)
    constants: Mapping[str, Leaf] = field(default_factory=dict)  # frozen leaves in the file
    shared: Mapping[str, Leaf] = field(default_factory=dict)  # of all layers; trained or frozen
    numbered: tuple[str, ...] = ()
    """Leaves whose key stands at the model, with the number of the layer among all of them."""
    derived: bool = False  # whether `init` makes the rest of the frozen leaves from the weight
    copied: bool = False  # whether PEFT also writes the shared tensors for each layer
    draw: Callable[[Mapping[str, Any], tuple[int, ...]], Mapping[str, Tensor]] | None = None
    """Shared constants that the file leaves out, of the config and the largest (d_out, d_in)."""
    place: Callable[[Mapping[str, Any], Any, tuple[int, ...]], Mapping[str, Tensor]] | None = None
    """Constants of one layer that are never in a file, of the config, the variant and its shape."""

    @property
    def keys(self) -> set[str]:
        """The keys of one layer, below its path."""
        return {leaf.key for leaf in (*self.leaves.values(), *self.constants.values())}
