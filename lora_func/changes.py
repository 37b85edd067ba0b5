"""What an adapter changes of each weight: a product B A where that is exact, or a dense matrix."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .engine import stack
from .engine.adapter import Adapter
from .engine.examples import Entries
from .engine.holder import entries_of
from .engine.sites import Base, Site
from .engine.untouched import ROUNDED
from .errors import LoraFuncError, listing
from .libraries.functorch import over_first_axis
from .merging import not_finite
from .precision import at_least_float32, autocast_off
from .variant import Variant, Weight
from .variants import C3A, FourierFT, Full, LoRA, SHiRA
from .weights.layer import LayerWeight
from .weights.parameter import ParameterWeight
from .weights.table import fingerprint

LINEAR = (Full, SHiRA, FourierFT, C3A)


class Change(NamedTuple):
    """The change of one weight, times a factor.

    In front of the axes of its matrices stands that of a stack, if the weight is one, and before
    it that of the examples, if the leaves have it.
    """

    site: Site
    entries: Entries
    stored: LayerWeight | ParameterWeight | None  # None: the model was not given
    factor: float | Tensor = 1.0

    @property
    def variant(self) -> Variant:
        return self.site.variant

    @property
    def base(self) -> Base:
        return self.site.base

    @property
    def examples(self) -> int | None:
        """The length of the example axis of its leaves, or None."""
        params, own, _ = self.entries
        return params[own[0]].shape[0] if own else None

    @property
    def linear(self) -> bool:
        """Whether the change is linear in the leaves and does not depend on the weight."""
        return type(self.variant) in LINEAR

    @property
    def matrix(self) -> bool:
        """Whether the weight is a matrix or a stack of such."""
        return len(self.base.shape) in (2, 3)

    def leaf(self, name: str) -> Tensor:
        """A trainable leaf, times the factor."""
        return self.factor * at_least_float32(self.entries.params[name])

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """`A [.., k, d_in]` and `B [.., d_out, k]` of the change B A, or None."""
        variant = self.variant
        if isinstance(variant, LoRA) and variant.add_bias:  # see `bias`
            variant = dataclasses.replace(variant, add_bias=False)
        if not self.matrix or type(variant).factors is Variant.factors:
            return None
        found = self.mapped(lambda weight, params: variant.factors(weight, params) or ())
        return (found[0], self.factor * found[1]) if found else None

    def bias(self) -> Tensor | None:
        """The change `[.., d_out]` of the bias beside that of `low_rank` or of Full, or None."""
        if isinstance(self.variant, LoRA) and self.variant.add_bias:
            return self.variant.scale * self.leaf("b")
        has_one = isinstance(self.variant, Full) and "d" in self.site.leaves
        return self.leaf("d") if has_one else None

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The change `[.., d_out, d_in]` of the weight, and that of the bias if there is one.

        What depends on the weight is a difference of two that are close: it runs in float64.
        """
        variant, linear = self.variant, self.linear

        def difference(weight: Weight, params: dict[str, Tensor]) -> tuple[Tensor, ...]:
            zero = torch.zeros((), dtype=torch.float64, device=weight.device)
            W = zero.expand(weight.shape) if linear else weight.dense().double()
            b = None if linear or weight.bias is None else weight.bias.double()
            wide = {n: t.double() if t.is_floating_point() else t for n, t in params.items()}
            W_eff, b_eff = variant.merged(Weight(W, b), wide)
            if b_eff is b or b_eff is None:
                return (W_eff - W,)
            return W_eff - W, b_eff if b is None else b_eff - b

        leaf = next(iter(self.site.leaves))
        dtype = torch.promote_types(self.entries.params[leaf].dtype, torch.float32)
        found = [self.factor * t.to(dtype) for t in self.mapped(difference)]
        return found[0], found[1] if len(found) > 1 else None

    def mapped(
        self, function: Callable[[Weight, dict[str, Tensor]], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """`function(weight, params)`, of each matrix of a stack, for each example.

        Raises LoraFuncError, with the path.
        """
        params, own, _ = self.entries
        stored = self.stored
        if isinstance(stored, ParameterWeight):
            W = stored.matrix.detach()
        else:  # a matrix without memory, because most functions do not read it
            W = next(iter(params.values())).new_zeros(()).expand(self.base.shape)

        def of_matrix(W: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return function(Lent(W, stored, self.site), params)

        def of_one(*leaves: Tensor) -> tuple[Tensor, ...]:
            return stack.over(of_matrix, W, {**params, **dict(zip(own, leaves))}, self.site.shared)

        try:
            with autocast_off(W.device):
                return over_first_axis(of_one, *(params[n] for n in own)) if own else of_one()
        except LoraFuncError as error:
            raise LoraFuncError(f"{self.site.path!r}: {error}") from error


class Lent(Weight):
    """The weight of a target, which is read when a variant asks for it."""

    def __init__(self, W: Tensor, stored: LayerWeight | ParameterWeight | None, site: Site):
        self.own = W  # of a parameter; of a layer or without a model, only its shape counts
        self.stored = stored
        self.site = site

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.own.shape)

    @property
    def device(self) -> torch.device:
        return self.own.device

    @property
    def matrix(self) -> Tensor:  # pyright: ignore  (an attribute of a plain Weight)
        if self.stored is None:
            kind = type(self.site.variant).__name__
            raise LoraFuncError(
                f"the change of {kind} depends on the weight: give model=, the model that the "
                "adapter was made for"
            )
        if not isinstance(self.stored, LayerWeight):
            return self.own
        W, known = self.stored.dense().detach(), self.site.base.fingerprint
        found = fingerprint(Weight(W))
        if W.dtype != ROUNDED and None not in (known, found) and known != found:
            warnings.warn(
                "the weights of model= are not those that the adapter was made on, and the change "
                f"of {type(self.site.variant).__name__} depends on them",
                stacklevel=2,
            )
        return W

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore  (the same)
        bias = None if self.stored is None else self.stored.bias
        return None if bias is None else bias.detach()


def changes_of(
    adapter: Adapter,
    params: Mapping[str, Tensor],
    model: nn.Module | None,
    factor: float | Tensor = 1.0,
) -> list[Change]:
    """The change of each target. Raises LoraFuncError for bad `params` or another model."""
    adapter.check(params)
    if broken := not_finite(params):
        raise LoraFuncError(
            f"params: {listing(broken)} has NaN or infinite entries. Take parameters from before "
            "the training diverged"
        )
    weights: dict[str, Any] = {} if model is None else adapter.weights(model)
    found = []
    for path in adapter.targets:
        site = adapter.site(path)
        entries = entries_of(site, {n: params[key] for n, (key, _) in site.leaves.items()})
        found.append(Change(site, entries, weights.get(path), factor))
    return found
