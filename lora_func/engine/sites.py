"""What the engine knows of one adapted layer, from finding it to calling it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..variant import Variant, Weight
from ..weights.layer import LayerWeight, TransposedWeight
from ..weights.table import fingerprint


class Found(NamedTuple):
    """A target in a model: where it is, what adapts it, and its weight."""

    path: str
    variant: Variant
    weight: LayerWeight


class Base(NamedTuple):
    """What an adapter remembers of the weight of a layer that it was made for."""

    shape: tuple[int, int]  # (d_out, d_in)
    fingerprint: str | None  # see weights.table.fingerprint
    transposed: bool = False  # whether a layer of an unknown class holds `[in, out]`

    @classmethod
    def of(cls, weight: LayerWeight, snapshot: Weight) -> Base:
        """Of a layer's weight, whose entries are read from `snapshot`."""
        return cls(weight.shape, fingerprint(snapshot), type(weight) is TransposedWeight)


class Site(NamedTuple):
    """An adapted layer as a call needs to know it."""

    path: str
    variant: Variant
    transposed: bool  # as in `Base`
    leaves: dict[str, tuple[str, int]]  # trainable: short name -> flat key, number of axes
    frozen: dict[str, Tensor]  # short name -> constant
