"""The adapted layer: where a variant is applied."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoraFuncError
from ..libraries import accelerate
from ..libraries.functorch import in_backward, in_transform
from ..precision import autocast_on, no_inference_mode
from ..variant import Prepared, Variant
from ..weights.table import weight_of
from .examples import Entries, each, prepare
from .holder import Holder, Note, Place, noted, unchanged
from .sites import Site
from .view import StandIn


class AdaptedLayer(StandIn, Holder):
    """Replaces an adapted layer in a view.

    It computes `variant.apply(x, layer(variant.transform_input(x)))`. In train mode the x that
    `apply` sees goes through dropout, if the adapter has any.
    `torch.func.functional_call(view, params, ...)` works too.
    """

    def __init__(self, layer: nn.Module, site: Site, params: Mapping[str, Tensor], keep: bool):
        check_bare(layer, site.path)
        super().__init__(layer)
        self.hold(site, params, keep)
        self.__dict__["_bound"] = keep
        self.__dict__["_running"] = set()  # threads in which a bound view's forward runs
        self.__dict__["_ran"] = self.__dict__["_read"] = False
        self.__dict__["_repeats"] = {}  # rows for each example that are admitted (see binding)

    def settle(self, call: bool, active: Tensor | None, each: int) -> None:
        """Reads the layer, once the view is complete.

        `call`: the view is for one call only. `active`: on which tokens the adapter acts. `each`:
        how many examples, one after the other, an entry of the example axis serves.
        """
        trains = torch.is_grad_enabled() and any(
            leaf.requires_grad for leaf in self.leaves().values()
        )
        layer: Any = self._modules["layer"]
        self.__dict__["training"] = layer.training
        self.__dict__["_weight"] = weight_of(layer, self._site.base.transposed)
        self.__dict__["_active"] = active
        variant = self._site.variant
        whole = overrides(variant, "fused") and not overrides(variant, "transform_input")
        self.__dict__["_may_fuse"] = whole and active is None
        self.__dict__["_each"] = each
        self.__dict__["_expects_grad"] = call and trains
        self.__dict__["_kept"] = self.__dict__["_whole"] = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and not torch.compiler.is_compiling():
            self.__dict__["_read"] = True
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_whole": None}  # a function of this very layer

    def train(self, mode: bool = True) -> AdaptedLayer:
        self.__dict__["_kept"] = None
        return super().train(mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # By its table, since an attribute of a module that is a module is slow to read.
        layer: Any = self._modules["layer"]
        variant, weight = self._site.variant, self._weight
        more = args or kwargs
        if not torch.compiler.is_compiling():
            self.__dict__["_ran"] = True
            if (whole := self._whole) and not more and (p := self.entries_again(x, whole)):
                return whole.run(x, p)
        p = self.entries(x.dtype)
        x = self.admit(x, p)
        if not more and (whole := self.whole(x, p)):
            return whole.run(x, p)
        active = None if self._active is None else self.acting(x)
        z = x
        if overrides(variant, "transform_input"):
            z = each(variant.transform_input, (x,), p, variant.broadcasts)
            z = z if active is None else torch.where(active, z, x)
        base_out = layer(z, *args, **kwargs)
        if not overrides(variant, "apply"):
            return base_out
        if base_out.dtype != x.dtype:
            p = self.entries(torch.promote_types(x.dtype, base_out.dtype))
        if self._site.dropout and self.training:
            x = F.dropout(x, self._site.dropout)
        apply = lambda x, y, p: variant.apply(x, y, weight, p)  # noqa: E731
        out = each(apply, (x, base_out), p, variant.broadcasts)
        return out if active is None else torch.where(active, out, base_out)

    def whole(self, x: Tensor, p: Entries) -> Whole | None:
        """The layer and its adapter as one function, for x and its like; None if they run apart.

        A bound view remembers it: most of its inputs are alike.
        """
        W = self._weight.to_fuse(x) if self.may_fuse(x, p) else None
        if W is None:
            return None
        layer: Any = self._modules["layer"]
        variant, weight, held = self._site.variant, self._weight, layer._parameters

        def run(x: Tensor, p: Entries) -> Tensor:
            W, b = (held["weight"], held["bias"]) if plain else (weight, None)
            if p.own:
                fused = lambda x, params: variant.fused(x, W, b, params)  # noqa: E731
                return each(fused, (self.admit(x, p),), p, variant.broadcasts)
            return variant.fused(x, W, b, variant.prepared(weight, p.params, x.dtype))

        plain = isinstance(W, Tensor)
        whole = Whole(run, x.dtype, p.own, torch.is_grad_enabled())
        if self._bound and not self._site.dropout:
            self.__dict__["_whole"] = whole
        return whole

    def entries_again(self, x: Tensor, whole: Whole) -> Entries | None:
        """The kept parameters, if x is like the input that `whole` was found for, and else None.

        In a forward of this thread, which has looked at the layer when it started.
        """
        kept, thread, grad = self._kept, threading.get_ident(), torch.is_grad_enabled()
        if kept is None:
            return None
        again = (
            type(x) is Tensor
            and x.dtype == whole.dtype == kept.entries.dtype
            and kept.entries.own == whole.own
            and grad == whole.grad
            and thread in self._running
            and (thread == kept.thread or not grad)
            and not in_transform()
            and not autocast_on(x.device)
        )
        return kept.entries if again else None

    def may_fuse(self, x: Tensor, p: Entries) -> bool:
        """Whether the variant's fused form can take the place of a layer that allows it."""
        if not self._may_fuse or (self.training and self._site.dropout):
            return False
        if p.own and not (self._site.variant.broadcasts and isinstance(p.params, Prepared)):
            return False
        if torch.compiler.is_compiling() or in_transform():
            return False
        return type(x) is Tensor and not autocast_on(x.device)

    @property
    def stored(self) -> Tensor | None:
        """The layer's own weight; None if it computes it."""
        return self._modules["layer"]._parameters.get("weight")  # pyright: ignore  (it has one)

    def admit(self, x: Tensor, p: Entries) -> Tensor:
        """`x` on the device of the parameters.

        Raises LoraFuncError if the adapter cannot act on it.
        """
        path = self._site.path
        if self._expects_grad and not torch.is_grad_enabled():
            raise LoraFuncError(
                f"gradients are switched off inside the model where it calls {path!r}, so its "
                "adapter would get none. With activation checkpointing, pass use_reentrant=False; "
                "otherwise leave this layer out of the targets, or call under torch.no_grad()"
            )
        first = next(iter(p.params.values()), x)
        x = accelerate.moved_input(self._modules["layer"], x, first.device)
        if p.own:
            n = p.params[p.own[0]].shape[0] * self._each
            if x.dim() < 2 or not (x.shape[0] == n or self.generates(x.shape[0], n)):
                raise LoraFuncError(misplaced(path, tuple(x.shape), n, self._each))
        return x

    def acting(self, x: Tensor) -> Tensor:
        """On which rows of x the adapter acts, `[.., 1]`.

        Raises LoraFuncError if `active` does not tell.
        """
        if x.shape[:-1] != self._active.shape:
            raise LoraFuncError(
                f"active has shape {tuple(self._active.shape)}, and {self._site.path!r} sees an "
                f"input of shape {tuple(x.shape)}: give one bool for each of its tokens, "
                f"{tuple(x.shape[:-1])}, or leave the layer out of the targets"
            )
        return self._active.to(x.device)[..., None]

    def generates(self, rows: int, n: int) -> bool:
        """Whether `generate` runs, which repeats each of n prompts, and these are its rows."""
        return rows in [n * k for k in self._repeats.values()]

    def entries(self, dtype: torch.dtype) -> Entries:
        """The parameters for an input of `dtype`, prepared if the variant prepares any.

        In a call they were prepared with the view, and in a bound view at the start of its forward:
        activation checkpointing repeats none of it. A bound view keeps them while no gradient is
        asked for, until a tensor that they come from changes. In train mode it keeps none that
        require grad: optimizers and averages also write to leaves through `.data`, which torch does
        not count as a change.
        """
        kept = self._kept
        if kept is not None and kept.entries.serves(dtype) and self.holds(kept):
            return kept.entries
        site, plain = self._site, self.plain()
        if not overrides(site.variant, "prepare"):
            return plain
        traced, keeps = in_transform() or torch.compiler.is_compiling(), self.keeps()
        with contextlib.nullcontext() if traced else no_inference_mode():  # dynamo cannot trace it
            entries = prepare(site.variant, self._weight, plain, dtype)
        if not traced:
            self.__dict__["_kept"] = Kept(entries, noted(self.sources()), None) if keeps else None
        return entries

    def holds(self, kept: Kept) -> bool:
        """Whether kept parameters are those of now."""
        if kept.sources is None:
            return True
        if kept.thread is not None and not torch.compiler.is_compiling():
            if kept.thread == threading.get_ident() and kept.thread in self._running:
                return True  # found when this forward of the view started
            if in_backward():  # checkpointing, which runs a part of that forward again
                return kept.still()
        return self.keeps() and kept.still()

    def keeps(self) -> bool:
        """Whether prepared parameters of a bound view may be kept."""
        return not (in_transform() or torch.compiler.is_compiling() or self.trains())

    def trains(self) -> bool:
        """Whether gradients may be asked for, or an optimizer be at work on the leaves."""
        if not (self.training or torch.is_grad_enabled()):
            return False
        return any(table[name].requires_grad for table, name in self.places())

    def begin(self) -> bool:
        """Before a forward of a bound view: whether to prepare the parameters for it.

        It forgets what no longer holds. Not to prepare if that moves the weight, which its own
        forward does, and not if it may keep them, and only the input says in which dtype. For eager
        mode, outside of transforms.
        """
        if self._whole and not self._weight.is_bare():
            self.__dict__["_whole"] = None
        kept, trains = self._kept, self.trains()
        if kept is not None and not trains:
            if kept.still():
                return False
            self.__dict__["_kept"] = None
        return self.prepares_ahead() and (trains or self._weight.input_dtype is not None)

    def prepares_ahead(self) -> bool:
        """Whether there is anything to prepare before an input comes."""
        if not overrides(self._site.variant, "prepare"):
            return False
        return self._whole is not None or self._weight.at_hand  # a bare layer has its matrix

    def dtype_ahead(self, likely: torch.dtype) -> torch.dtype | None:
        """For which dtype of inputs to prepare before there is any; None if nothing is to be.

        `likely`: of a layer that takes several. Under autocast, float32 or wider: casts to another
        then come last.
        """
        if not self.prepares_ahead():
            return None
        dtype = self._weight.input_dtype or likely
        if autocast_on(self._weight.device):
            return torch.promote_types(dtype, torch.float32)
        return dtype

    def take(self, entries: Entries) -> None:
        """Keeps prepared parameters for a whole call, or forward of a bound view."""
        if self._bound:
            kept = Kept(entries, noted(self.sources()), threading.get_ident())
        else:
            kept = Kept(entries, None, None)
        self.__dict__["_kept"] = kept

    def sources(self) -> list[Place]:
        """Where the tensors are that the parameters may be prepared from."""
        own: Any = self._weight.layer._parameters
        if self._site.variant.card.reads != "rows":
            return [*self.places(), (own, "bias")]
        return [*self.places(), *((own, name) for name in own)]


def misplaced(path: str, shape: tuple[int, ...], n: int, each: int) -> str:
    """The message for an input whose first axis is not that of the examples."""
    message = (
        f"{path!r} sees an input of shape {shape}, whose first axis is not that of the {n} "
        "examples of its parameters: the batch has another size, or the model moves its examples "
        "before this layer (time first, tokens flattened, experts). Leave the layer out of the "
        "targets, or give it parameters without the example axis"
    )
    k, rest = divmod(shape[0], n // each) if shape and n else (0, 0)
    if k not in (0, each) and not rest:
        message += (
            f". If each entry of the parameters is for {k} examples, one after the other, say "
            f"each={k} instead of each={each}"
        )
    return message


def check_bare(layer: nn.Module, path: str) -> None:
    """Raises LoraFuncError if the layer at `path` carries an adapter already."""
    if isinstance(layer, AdaptedLayer):
        raise LoraFuncError(
            f"{path!r} carries an adapter already: the model is a bound view. Use the base model, "
            "or merge the first adapter into its weights (lf.merge)"
        )


class Whole(NamedTuple):
    """A layer and its adapter as one function."""

    run: Callable[[Tensor, Entries], Tensor]
    dtype: torch.dtype  # of the inputs for which it was found
    own: tuple[str, ...]  # the parameters with an example axis then
    grad: bool  # whether gradients were on


class Kept(NamedTuple):
    """Prepared parameters."""

    entries: Entries
    sources: Sequence[Note] | None  # what they come from; None: they hold for the whole call
    thread: int | None  # whose forward they were prepared for, before any input; None: for an input

    def still(self) -> bool:
        """Whether what they come from has not changed."""
        return unchanged(self.sources or ())


def overrides(variant: Variant, method: str) -> bool:
    """Whether the variant has a method of its own: under vmap, even the identity costs 0.1 ms."""
    return getattr(type(variant), method) is not getattr(Variant, method)
