"""The contract between an adapter and the engine. Read this file first.

An adapter is a *variant*: a frozen dataclass whose fields are its hyperparameters and whose methods are pure functions of
tensors. For one linear layer with input `x [.., d_in]`, weight `W [d_out, d_in]` and bias `b`, the engine computes

    x'       = variant.transform_input(x, params)            identity unless overridden
    base_out = base layer of x'  =  x' Wᵀ + b
    out      = variant.apply(x, base_out, weight, params)    `base_out` unless overridden

`params` is one flat dict under short names ("A", "B", ...): the layer's trainable tensors, its frozen constants, and the
tensors that all layers of the variant share. Five rules hold for every variant; each was measured (see docs/design.md):

1. Additive-residual form: `base_out + delta`, with a delta that is literally zero at init. Identity at init is then exact
   to the bit in every dtype, and a quantized base keeps its own rounding.
2. `x` is never cast up. Parameters live in float32 and are cast to the dtype of `x` for the product with it; small solves,
   norms and decompositions run in float32.
3. Nothing of size d_out x d_in, and no copy of `x`, is kept for backward.
4. No randomness, no `.item()`, no branch on data, no write into a fresh tensor: each of these fails under `torch.vmap`.
5. A gate near 1 is stored as its deviation from 1, so that low precision does not swallow its steps.
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import LoraFuncError


@dataclass(frozen=True)
class Params:
    """What `Variant.init` returns: two dicts of tensors under short names, without a name in common.

    `trainable` leaves become the flat dict that users train; `frozen` leaves are constants that the `Adapter` carries and
    that a file stores. A frozen leaf called `<name>0` is the *anchor* of the trainable leaf `<name>`: the value it starts
    from, and starts from again at every `Adapter.init`.
    """

    trainable: dict[str, Tensor]
    frozen: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if both := self.trainable.keys() & self.frozen.keys():
            raise LoraFuncError(f"a leaf is either trainable or frozen, but {sorted(both)} are both")


class Weight:
    """The frozen linear map of one layer. It hides how the layer stores its matrix (transposed, packed in 4 bits, ...).

    `Weight(matrix [d_out, d_in], bias [d_out] or None)` is a plain one. A variant that needs no weight never calls it.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None = None):
        self.matrix = matrix
        self.bias = bias

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`."""
        d_out, d_in = self.matrix.shape
        return d_out, d_in

    @property
    def device(self) -> torch.device:
        """Where the layer's parameters belong."""
        return self.matrix.device

    def __call__(self, z: Tensor) -> Tensor:
        """`z Wᵀ` without the bias, `[.., d_in] -> [.., d_out]`: computed in the weight's dtype, returned in that of `z`."""
        return F.linear(z.to(self.matrix.dtype), self.matrix).to(z.dtype)

    def dense(self) -> Tensor:
        """`W [d_out, d_in]`, in the dtype in which it is stored or dequantized. For init and merge, not for the forward."""
        return self.matrix


@dataclass(frozen=True, kw_only=True)
class Statistic(abc.ABC):
    """What calibration sums up for a layer (see `calibrate`). A subclass is a frozen dataclass with `update`, and what else it
    overrides; variants whose statistics are equal share one.
    """

    observes: ClassVar[str] = "inputs"  # or "outputs", or "gradients": inputs and dL/d(output)

    def init(self, weight: Weight) -> Any:
        """The state before any token. None means nothing seen yet, and lets layers that read one input share their states."""
        return None

    @abc.abstractmethod
    def update(self, state: Any, tokens: Any) -> Any:
        """A new state, with the rows `[n, d]` that this batch brings, n at least 1; for "gradients" a pair of them. Pure."""

    def finalize(self, states: Mapping[str, Any]) -> Mapping[str, Any]:
        """path -> what `Variant.init` gets as `stats`, from the states of all layers; None where a layer saw nothing."""
        return states


@dataclass(frozen=True, kw_only=True)
class Variant(abc.ABC):
    """Base class of all adapters. A subclass is a frozen, keyword-only dataclass with `init` and what it overrides."""

    @classmethod
    def name(cls) -> str:
        """The name under which files and the catalogue know this variant: the class name in lower case."""
        return cls.__name__.lower()

    @property
    def statistic(self) -> Statistic | None:
        """What `init` wants to know of the data that the layer sees; None for most variants."""
        return None

    @property
    def lr_scale(self) -> Mapping[str, float]:
        """Short names of leaves that learn at a multiple of the others' rate -> that multiple."""
        return {}

    @abc.abstractmethod
    def init(self, weight: Weight, generator: torch.Generator | None, stats: Any = None) -> Params:
        """Fresh parameters for one layer, in float32 (float64 where derived from a float64 weight).

        Random leaves are drawn from `generator` only (`None`: torch's default one) and on its device; the engine moves them
        to the layer. `stats` is what calibration collected for this layer, for variants with a `statistic`. A layer for which
        nothing is returned drops out.
        """

    def like(self, weight: Weight, leaves: Mapping[str, Tensor]) -> Params:
        """What a file should hold for one layer, for its names, shapes and dtypes; `weight` has no data (device "meta").

        A variant whose `init` needs data overrides this. `leaves` are those of the file, for shapes that depend on the data.
        """
        return self.init(weight, None)

    def init_shared(self, weights: Sequence[Weight], generator: torch.Generator | None) -> Params:
        """Tensors common to all layers of this variant, drawn once. `weights` are those of its layers."""
        return Params({})

    def rebuild(self, weight: Weight, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The frozen leaves that a file need not hold (`save(..., frozen="rebuild")`), from the weight and the other leaves.

        None for most variants: they must mean the same adapter wherever they are computed.
        """
        return {}

    def transform_input(self, x: Tensor, params: dict[str, Tensor]) -> Tensor:
        """`x [.., d_in]` as the base layer shall see it, same shape and dtype."""
        return x

    def apply(self, x: Tensor, base_out: Tensor, weight: Weight, params: dict[str, Tensor]) -> Tensor:
        """The output of the adapted layer, `[.., d_out]` in the dtype of `base_out`."""
        return base_out

    def merged(self, weight: Weight, params: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """`(W_eff [d_out, d_in], b_eff [d_out] or None)` such that the adapted layer is `x W_effᵀ + b_eff`.

        Raises LoraFuncError where no such closed form exists.
        """
        raise LoraFuncError(f"{type(self).__name__} has no closed form as one linear layer, so it cannot be merged")


def check_rank(variant: Variant, name: str = "r") -> None:
    """Raises LoraFuncError unless the field `name` is an integer of at least 1."""
    value = getattr(variant, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LoraFuncError(f"{type(variant).__name__}({name}={value!r}): {name} must be an integer of at least 1, such as 8")


def check_positive(variant: Variant, name: str) -> None:
    """Raises LoraFuncError unless the field `name` is a finite number above 0."""
    value = getattr(variant, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:  # an int of 400 digits is no float
        raise LoraFuncError(f"{type(variant).__name__}({name}={value!r}): {name} must be a finite number above 0")


def check_number(variant: Variant, name: str) -> None:
    """Raises LoraFuncError unless the field `name` is a finite number."""
    value = getattr(variant, name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise LoraFuncError(f"{type(variant).__name__}({name}={value!r}): {name} must be a finite number")


def check_choice(variant: Variant, name: str, choices: Sequence[Any]) -> None:
    """Raises LoraFuncError unless the field `name` is one of `choices` (compared with its type, so that 1 is not True)."""
    value = getattr(variant, name)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        expected = " or ".join(repr(choice) for choice in choices)
        raise LoraFuncError(f"{type(variant).__name__}({name}={value!r}): {name} must be {expected}")
