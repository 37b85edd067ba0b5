"""The contract between an adapter and the engine. Read this file first.

An adapter is a *variant*: a frozen dataclass. Its fields are the hyperparameters; its methods are
pure functions of tensors. For one linear layer with input `x [.., d_in]`, weight
`W [d_out, d_in]` and bias `b`, the engine computes

    x'       = variant.transform_input(x, params)            x, unless overridden
    base_out = base layer of x'  =  x' Wᵀ + b
    out      = variant.apply(x, base_out, weight, params)    base_out, unless overridden

`params` is a flat dict under short names ("A", "B", ...). It holds the layer's trainable tensors,
its frozen constants, and the tensors that all layers of the variant share.

A variant may split off the work that does not depend on x:

    prepared = variant.prepare(weight, params, dtype)        params, unless overridden

The engine calls `prepare` once and passes the result to `transform_input` and `apply` in the place
of `params`, for any number of inputs. Both also take plain `params` and prepare them first, by
`self.prepared(..)`. The result is the same to the bit.

Five rules hold for every variant. docs/design.md gives the measurement behind each:

1. Additive form: return `base_out + delta`, with a delta that is exactly zero at init. The output
   at init is then the base output to the bit in every dtype, on quantized layers too.
2. Never cast `x` up. Parameters live in float32 and are cast to the dtype of `x` for the product
   with it. Small solves, norms and decompositions run in float32.
3. Keep nothing of size d_out x d_in for backward, and no copy of `x`.
4. Use no randomness, no `.item()`, no branch on data, and no write into a fresh tensor: each
   fails under `torch.vmap`.
5. Store a gate near 1 as its deviation from 1: low precision would swallow its steps.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .card import Card
from .errors import LoraFuncError, deprecated, near_misses
from .precision import autocast_off

__all__ = ["Params", "Prepared", "Statistic", "Variant", "Weight"]

# Names that other libraries use -> what to use here.
ELSEWHERE = {
    "rank": "r",
    "lora_r": "r",
    "lora_alpha": "alpha",
    "use_rslora": "rslora",
    "lora_bias": "add_bias",
    "init_lora_weights": "start, or a variant of its own such as PiSSA,",
    "stable_gamma": "gamma",
    "use_dora": "the variant DoRA",
    "delora_lambda": "lambda0",
    "oft_block_size": "block_size",
    "target_modules": "adapt(.., targets=Targets(names=..))",
    "targets": "adapt(.., targets=Targets(names=..))",
    "lora_dropout": "adapt(.., dropout=..)",
    "layers_to_transform": "adapt(.., targets=Targets(layers=..))",
}


@dataclass(frozen=True)
class Params:
    """What `Variant.init` returns: two dicts of tensors under short names, with no name in common.

    `trainable` leaves become the flat dict that users train. `frozen` leaves are constants: the
    `Adapter` carries them and a file stores them. A frozen leaf `<name>0` is the *anchor* of the
    trainable leaf `<name>`, the value from which every `Adapter.init` starts it.
    """

    trainable: dict[str, Tensor]
    """Short name -> tensor that is trained."""
    frozen: dict[str, Tensor] = field(default_factory=dict)
    """Short name -> constant."""

    def __post_init__(self) -> None:
        if both := self.trainable.keys() & self.frozen.keys():
            raise LoraFuncError(
                f"a leaf is either trainable or frozen, but {sorted(both)} are both"
            )


class Prepared(dict[str, Tensor]):
    """What `Variant.prepare` returned. The type tells it from plain `params`."""


class Weight:
    """The frozen linear map of one layer. It hides how the layer stores its matrix.

    `Weight(matrix [d_out, d_in], bias [d_out] or None)` is a plain one.
    """

    opaque: ClassVar[bool] = False
    """Whether the matrix is packed: `dense` unpacks it at each reading, and torch.func transforms
    cannot pass the layer's own kernel."""

    def __init__(self, matrix: Tensor, bias: Tensor | None = None):
        self.matrix = matrix
        self.bias = bias

    @property
    def shape(self) -> tuple[int, ...]:
        """`(d_out, d_in)`. For a tensor that is not a matrix, such as a bias, its own shape."""
        return tuple(self.matrix.shape)

    @property
    def device(self) -> torch.device:
        """The device where the layer computes, and where its parameters belong."""
        return self.matrix.device

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The dtype that the input of the layer has, most likely; None if there is no telling."""
        return self.matrix.dtype

    def __call__(self, z: Tensor) -> Tensor:
        """`z Wᵀ` without the bias, `[.., d_in] -> [.., d_out]`.

        Computes in the dtype of the weight and returns that of `z`.
        """
        W = self.matrix  # read once: an offloaded one is copied, a sharded one gathered
        return F.linear(z.to(W.dtype), W).to(z.dtype)

    def dense(self) -> Tensor:
        """`W [d_out, d_in]`, in the dtype in which it is stored or dequantized.

        For `init` and `merged`. A forward pass calls the weight instead, unless the card says that
        it reads "dense": then `apply` makes the matrix anew, and keeps none for backward.
        """
        return self.matrix


@dataclass(frozen=True, kw_only=True)
class Statistic(abc.ABC):
    """What calibration sums up for a layer.

    A subclass is a frozen dataclass with `update`, and overrides of the rest. Variants with equal
    statistics share one pass and one state.
    """

    observes: ClassVar[str] = "inputs"
    """What `update` is given: "inputs", "outputs", or "gradients" (the pair of inputs and
    dL/d(output))."""

    def init(self, weight: Weight) -> Any:
        """The state before any token. None lets layers that read one input share their states."""
        return None

    @abc.abstractmethod
    def update(self, state: Any, tokens: Any) -> Any:
        """A new state, with the rows `[n, d]` of one batch added, n >= 1. Pure.

        For "gradients", `tokens` is a pair of such rows.
        """

    def finalize(self, states: Mapping[str, Any]) -> Mapping[str, Any]:
        """path -> what `Variant.init` gets as `stats`, from the states of all layers.

        None for a layer that saw no token.
        """
        return states

    def check(self, stats: Any, weight: Weight) -> None:  # noqa: B027  (nothing to check)
        """Raises LoraFuncError if `stats` is not what `finalize` returns for a layer like this."""


T = TypeVar("T")  # the class that is constructed: type checkers then check its fields


class VariantType(abc.ABCMeta):
    """Makes a constructor list its fields when it is given an unknown one."""

    def __call__(cls: type[T], *args: Any, **given: Any) -> T:
        known = [item.name for item in dataclasses.fields(cls) if item.init]  # pyright: ignore
        if args and not cls.positional:  # pyright: ignore
            example = f"{cls.__name__}({known[0]}={args[0]!r})" if known else f"{cls.__name__}()"
            raise LoraFuncError(f"{cls.__name__} takes its fields by name, as in {example}")
        for old, new in cls.renamed.items():  # pyright: ignore
            if old in given:
                if new in given:
                    raise LoraFuncError(
                        f"{cls.__name__} was given {new}= and its old name {old}=: leave {old}= out"
                    )
                deprecated(f"{cls.__name__}({old}=..)", f"{new}=", "0.2")
                given[new] = given.pop(old)
        for name in given:
            if name not in known:
                fields = ", ".join(known) or "none"
                hint = near_misses(name, known)
                if name in ELSEWHERE:
                    hint = f" It is called {ELSEWHERE[name]} here."
                raise LoraFuncError(
                    f"{cls.__name__} has no field {name!r}; its fields are: {fields}.{hint}"
                )
        return super().__call__(*args, **given)


@dataclass(frozen=True, kw_only=True)
class Variant(abc.ABC, metaclass=VariantType):
    """Base class of all adapters.

    A subclass is a frozen, keyword-only dataclass with `init`, and overrides of the rest.
    """

    card: ClassVar[Card] = Card()
    """What is known of the method. Tables, tests and benchmarks read it."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Old name -> new name of a field, for files and code that use the old one."""
    positional: ClassVar[bool] = False
    """Whether its constructor takes positional arguments."""
    broadcasts: ClassVar[bool] = False
    """Whether `transform_input` and `apply` take a batch of examples with leaves of their own.

    x is then `[n, rows, d_in]`, and prepared leaves have an axis n in front, or are shared by
    all examples. If False, the engine maps both over the examples, which takes longer.
    A subclass that overrides one of the two says it anew: False, unless it says True.
    """
    rounds_last: ClassVar[bool] = False
    """Whether `prepare` for a dtype is `prepare` for a wider one, with all tensors rounded.

    Then the engine rounds those of all layers in one kernel. A subclass that overrides
    `prepare` says it anew: False, unless it says True.
    """
    prepares_together: ClassVar[bool] = False
    """Whether `prepare` runs once for all equal layers, under vmap over them.

    Worth it if it does more than casts, and makes no more entries than a few times those of the
    leaves: they are copied. Of the weight, it may then use `weight(z)`, its bias, shape
    and device. A subclass that overrides `prepare` says it anew: False, unless it says True.
    """

    @classmethod
    def name(cls) -> str:
        """The name in files and in the catalogue: the class name in lower case."""
        return cls.__name__.lower()

    @property
    def statistic(self) -> Statistic | None:
        """What `init` needs to know of the data that passes the layer, if anything."""
        return None

    @property
    def looks_at_data(self) -> bool:
        """Whether `init` takes stats."""
        return self.statistic is not None or self.card.data != "none"

    def parts(self) -> tuple[Variant, ...]:
        """The variants of which it is made: itself, or those of a chain."""
        return (self,)

    @property
    def lr_scale(self) -> Mapping[str, float]:
        """Short name -> multiple of the learning rate, for leaves that learn at another rate."""
        return {}

    @property
    def exact_gradient(self) -> bool:
        """Whether autograd returns the derivative of the adapter.

        False for a method that treats a part of itself as constant.
        """
        return True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if "prepare" in own:
            for promise in ("rounds_last", "prepares_together"):
                if promise not in own:
                    setattr(cls, promise, False)
        if "apply" in own or "transform_input" in own:
            # What a base class says of its own functions may not hold for others.
            if "broadcasts" not in own:
                cls.broadcasts = False
            if "fused" not in own:
                cls.fused = Variant.fused

    @abc.abstractmethod
    def init(self, weight: Weight, generator: torch.Generator | None, stats: Any = None) -> Params:
        """Fresh parameters for one layer, in float32 (float64 if derived from a float64 weight).

        Draws random leaves from `generator` only (None: torch's default) and on its device; the
        engine moves them to the layer. `stats` is what calibration found for this layer. A layer
        for which no leaf is returned gets no adapter.
        """

    def drawing(self, names: Collection[str]) -> Variant:
        """What draws the trainable leaves `names` anew, where all others start at their anchors.

        Itself; a chain leaves out the links that have nothing to draw.
        """
        return self

    def like(self, weight: Weight, leaves: Mapping[str, Tensor]) -> Params:
        """The names, shapes and dtypes that a file must hold for one layer.

        Override it if `init` needs data. `weight` is on the device "meta" and has no values.
        `leaves` are those in the file, for shapes that depend on data.
        """
        return self.init(weight, None)

    def init_shared(self, weights: Sequence[Weight], generator: torch.Generator | None) -> Params:
        """Tensors that all layers of this variant share, drawn once for the `weights` of all."""
        return Params({})

    def rebuild(self, weight: Weight, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Frozen leaves that `save(.., frozen="rebuild")` may leave out, computed anew on load.

        Empty by default. Return only constants that every machine recomputes to an equivalent
        adapter, from the weight and the other leaves.
        """
        return {}

    def prepare(
        self, weight: Weight, params: dict[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """All that `transform_input` and `apply` need and that does not depend on x.

        `dtype` is that of x, or a wider one: round to it last. Runs with autocast off. `weight`
        is None if `transform_input` was called with plain params.
        """
        return params

    def transform_input(self, x: Tensor, params: dict[str, Tensor]) -> Tensor:
        """What the base layer sees instead of `x [.., d_in]`, in the same shape and dtype."""
        return x

    def apply(
        self, x: Tensor, base_out: Tensor, weight: Weight, params: dict[str, Tensor]
    ) -> Tensor:
        """The output of the adapted layer, `[.., d_out]`, in the dtype of `base_out`."""
        return base_out

    def fused(self, x: Tensor, W: Tensor, b: Tensor | None, params: dict[str, Tensor]) -> Tensor:
        """`apply` of the output of a plain linear layer, with the product of that layer inside.

        `x [.., d_in]`, `W [d_out, d_in]` and `b [d_out]` or None have one dtype, and so has the
        result `[.., d_out]`. `params` are prepared, and W and b do not require grad. A packed W is
        a `fused.Packed`, which has its bias.

        Optional: for a form that takes less time or memory than `F.linear(x, W, b)` and `apply`, as
        `fused.low_rank_linear` does. The engine takes it where the layer is an `nn.Linear` or a
        4-bit one without hooks, in eager mode and outside of torch.func. A subclass that overrides
        `apply` or `transform_input` says it anew.
        """
        raise NotImplementedError  # the engine asks only those that override it

    def merged(self, weight: Weight, params: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """`(W_eff [d_out, d_in], b_eff [d_out] or None)`: the adapter as one linear layer.

        In float32 or wider, with autocast off. It must be differentiable and work under
        `torch.vmap`, which maps it over a stack of matrices. If the output at init is exact, so is
        W_eff: write it as W plus a term that is exactly zero. Raises LoraFuncError if there is no
        such closed form.
        """
        raise LoraFuncError(
            f"{type(self).__name__} has no closed form as one linear layer, so it cannot be merged"
        )

    def factors(self, weight: Weight, params: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """`(A [k, d_in], B [d_out, k])` with `W_eff = W + B A`, for any k; the bias stays.

        None if the change of the weight has no such form. The rules of `merged` hold here too. If
        the output at init is exact, every term in the sums of B A must be exactly zero at init:
        terms that only cancel leave a remainder, which depends on the order of the sum. So write
        B A - B0 A0 as (B - B0) A + B0 (A - A0), as `linalg.low_rank_difference` does.
        """
        return None

    def prepared(
        self, weight: Weight | None, params: dict[str, Tensor], dtype: torch.dtype
    ) -> Prepared:
        """`params` if they are prepared already, otherwise `prepare(weight, params, dtype)`."""
        if isinstance(params, Prepared):
            return params
        device = next((leaf.device for leaf in params.values()), torch.device("cpu"))
        with autocast_off(device):
            return Prepared(self.prepare(weight, params, dtype))  # pyright: ignore  (None)
