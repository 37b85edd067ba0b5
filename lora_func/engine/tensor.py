"""The adapted parameter: what a view holds in the place of a parameter that is a target."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LoraFuncError
from ..libraries.functorch import in_backward, in_transform, over_first_axis
from ..precision import at_least_float32, autocast_off
from ..variant import Variant, Weight
from ..weights.experts import virtual
from ..weights.low_rank import LowRank
from ..weights.parameter import ParameterWeight
from ..weights.terms import uncounted
from . import stack
from .examples import Entries
from .holder import Holder, Note, noted, unchanged
from .sites import Site
from .view import twin


def shown(site: Site, weight: ParameterWeight, entries: Entries) -> Tensor:
    """The parameter with its adapter in it, in its own layout and dtype.

    If the variant changes it by factors, it is a `LowRank`: no dense tensor is formed until a
    module asks for more than products. A trace takes the dense one, which dynamo can follow.

    Raises LoraFuncError for leaves with an example axis if the variant has no factors.
    """
    factors = None if torch.compiler.is_compiling() else factors_of(site, weight, entries)
    if factors is not None:
        A, B = factors
        P = weight.stored.detach()
        n = entries.params[entries.own[0]].shape[0] if entries.own else None
        both = LowRank(P, A, B, weight.layout, lambda: dense(site, weight, entries), n, site.path)
        return both if n is None or not weight.layout.is_stack else virtual(both, n, site.path)
    return dense(site, weight, entries)


def dense(
    site: Site, weight: ParameterWeight, entries: Entries, dtype: torch.dtype | None = None
) -> Tensor:
    """The same, as a plain tensor of the parameter's dtype, or of `dtype`.

    Raises LoraFuncError for leaves with an example axis, and for a variant that adds a bias.
    """
    if entries.own:
        raise LoraFuncError(
            f"{site.path!r}: its module uses the parameter in a way that cannot tell the examples "
            f"of a batch apart, for {type(site.variant).__name__}. Give it parameters without the "
            "example axis"
        )

    def merged(W: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, ...]:
        W_eff, bias = site.variant.merged(Weight(W), params)
        if bias is not None:
            raise LoraFuncError(
                f"{type(site.variant).__name__} changes the bias of a layer, and {site.path!r} is "
                "a parameter, which has none: name the layer itself"
            )
        return (W_eff,)

    P = weight.stored.detach()
    with autocast_off(P.device):
        W = at_least_float32(weight.layout.matrix(P))
        (W_eff,) = stack.over(merged, W, entries.params, site.shared)
        return weight.as_stored(W_eff).to(dtype or P.dtype)


def factors_of(
    site: Site, weight: ParameterWeight, entries: Entries
) -> tuple[Tensor, Tensor] | None:
    """The factors A `[.., k, d_in]` and B `[.., d_out, k]` of the change, or None if it has none.

    In front of their own axes: that of the stack, and before it that of the examples.
    """
    variant, (params, own, _) = site.variant, entries
    if type(variant).factors is Variant.factors or not weight.layout.is_matrix:
        return None
    W = weight.layout.matrix(weight.stored.detach())

    def factors(W: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return variant.factors(Weight(W), params) or ()

    def of_one(*leaves: Tensor) -> tuple[Tensor, ...]:
        return stack.over(factors, W, {**params, **dict(zip(own, leaves))}, site.shared)

    with autocast_off(W.device):
        found = over_first_axis(of_one, *(params[name] for name in own)) if own else of_one()
    return (found[0], found[1]) if found else None


class AdaptedTensor(Holder):
    """Holds a parameter and its leaves in a view. `tensor` shows the two as one.

    In a call it is made with the view. A bound view makes it once for each forward; without
    gradients and in eval mode once, until a tensor that it comes from changes. Activation
    checkpointing, which runs parts of the forward again in the backward, gets the same one.
    """

    _weight: ParameterWeight
    _kept: Shown | None
    _running: set[int]  # threads in which a forward of the view runs
    _copies: int | None  # how often its entries come, one after the other (see `apart`)

    def __init__(
        self, weight: ParameterWeight, site: Site, params: Mapping[str, Tensor], keep: bool
    ):
        super().__init__()
        # The base first: a model may take the dtype of its first parameter for its own.
        base = twin(weight.stored) if keep else weight.stored.detach()
        self._parameters["base"] = base  # pyright: ignore  (a frozen parameter)
        self.hold(site, params, keep)
        self.__dict__["training"] = weight.module.training
        self.__dict__["_weight"] = weight.held_by(self, "base")
        self.__dict__["_running"] = set()
        self.__dict__["_read"] = False
        self.__dict__["_copies"] = None
        self.__dict__["_keep"] = keep
        self.__dict__["_kept"] = None if keep else Shown(self.made(), False, ())

    @property
    def place(self) -> str:
        return self._weight.path.rpartition(".")[0]

    @property
    def stored(self) -> Tensor:
        """The parameter of the base."""
        return self._parameters["base"]  # pyright: ignore  (it has one)

    def examples(self) -> int | None:
        """The length of the example axis of its leaves, or None."""
        params, own, _ = self.plain()
        return params[own[0]].shape[0] if own else None

    def tensor(self) -> Tensor:
        """The parameter with its adapter in it."""
        if torch.compiler.is_compiling():
            return self.made()
        self.__dict__["_read"] = True
        kept = self._kept
        if kept is not None and not self._keep:
            return kept.tensor
        if in_transform():
            return self.made()
        if kept is not None and (self.runs() or self.recomputes(kept) or self.serves(kept)):
            return kept.tensor
        made = Shown(self.made(), self.trains(), self.sources())
        if not made.trains:
            self.__dict__["_kept"] = made
        return made.tensor

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raises LoraFuncError: it is called where a module runs whatever its children are."""
        raise LoraFuncError(
            f"{self._site.path!r}: its module calls all of its children, and an adapted parameter "
            "is one of them. Leave it out of the targets"
        )

    def begin(self) -> None:
        """Before a forward of the view."""
        if torch.compiler.is_compiling() or in_transform():
            self.__dict__["_kept"] = None
            return
        if self._kept is None or not self.serves(self._kept):
            self.__dict__["_kept"] = Shown(self.made(), self.trains(), self.sources())
        self._running.add(threading.get_ident())

    def end(self) -> None:
        """After it, whether or not it raised."""
        if not torch.compiler.is_compiling():
            self._running.discard(threading.get_ident())

    def train(self, mode: bool = True) -> AdaptedTensor:
        self.__dict__["_kept"] = None
        return super().train(mode)

    def made(self) -> Tensor:
        """The tensor, made anew."""
        return self.shown() if torch.compiler.is_compiling() else uncounted(self.shown)

    def shown(self) -> Tensor:
        """The tensor as its module sees it."""
        made = shown(self._site, self._weight, self.plain())
        return made if self._copies is None else virtual(made, self._copies, self._site.path)

    def apart(self, n: int) -> None:
        """Repeats each entry for n examples, of which other stacks of its module have their own."""
        self.__dict__["_copies"] = n
        if self._kept is not None:
            self.__dict__["_kept"] = self._kept._replace(tensor=self.made())

    def runs(self) -> bool:
        """Whether a forward of the view runs in this thread."""
        return threading.get_ident() in self._running

    def trains(self) -> bool:
        """Whether what is made now has gradients."""
        grad = torch.is_grad_enabled()
        return grad and any(leaf.requires_grad for leaf in self.leaves().values())

    def recomputes(self, kept: Shown) -> bool:
        """Whether checkpointing runs a part again that needs what the forward had."""
        return in_backward() and (kept.trains or not self.trains())

    def sources(self) -> list[Note]:
        """The tensors that the parameter is made from."""
        return noted([(self._parameters, "base"), *self.places()])

    def serves(self, kept: Shown) -> bool:
        """Whether what was made before is what would be made now."""
        free = not (kept.trains or self.trains() or self.training)
        return free and unchanged(kept.sources)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_running": set()}


class Shown(NamedTuple):
    """A tensor that was made, whether it has gradients, and its sources."""

    tensor: Tensor
    trains: bool
    sources: Sequence[Note]


def experts_apart(tensors: Sequence[AdaptedTensor]) -> dict[str, int]:
    """Path of each module with stacks that have an example axis -> the number of examples.

    What else of such a module is adapted, without the axis, is repeated for each example.
    """
    found = {}
    for tensor in tensors:
        n = tensor.examples()
        if n is not None and tensor._weight.layout.is_stack:
            found[tensor.place] = n
    for tensor in tensors:
        if tensor.place in found and tensor.examples() is None:
            tensor.apart(found[tensor.place])
    return found
