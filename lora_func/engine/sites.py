"""What the engine knows of one adapted layer, from finding it to calling it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..variant import Variant, Weight
from ..weights.layer import LayerWeight, TransposedWeight
from ..weights.parameter import ParameterWeight
from ..weights.table import fingerprint


class Found(NamedTuple):
    """A target in a model: where it is, what adapts it, and its weight."""

    path: str
    variant: Variant
    weight: LayerWeight | ParameterWeight


class Base(NamedTuple):
    """What an adapter remembers of a weight that it was made for."""

    shape: tuple[int, ...]  # (d_out, d_in) of a layer; of a parameter, see weights.parameter.Layout
    fingerprint: str | None  # see weights.table.fingerprint
    transposed: bool = False  # whether a parameter, or a layer of an unknown class, is `[in, out]`
    tensor: str | None = None  # the path of a parameter; None for a layer that is called

    @classmethod
    def of(cls, weight: LayerWeight | ParameterWeight, snapshot: Weight) -> Base:
        """Of a weight whose entries are read from `snapshot`."""
        if isinstance(weight, ParameterWeight):
            transposed, tensor = weight.layout.transposed, weight.path
        else:
            transposed, tensor = type(weight) is TransposedWeight, None
        return cls(tuple(weight.shape), fingerprint(snapshot), transposed, tensor)


class Site(NamedTuple):
    """A target as a call needs to know it."""

    path: str
    variant: Variant
    base: Base
    leaves: dict[str, tuple[str, int]]  # trainable: short name -> flat key, number of axes
    frozen: dict[str, Tensor]  # short name -> constant
    shared: frozenset[str]  # short names of what all targets of the variant share
    dropout: float = 0.0  # of what the variant's `apply` sees, in train mode
