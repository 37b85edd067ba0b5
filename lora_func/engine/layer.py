"""The adapted layer: where a variant is applied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LoraFuncError
from ..libraries import accelerate
from ..libraries.functorch import in_transform
from ..precision import autocast_on
from ..variant import Variant
from ..weights.table import weight_of
from .examples import Entries, each, prepare
from .sites import Site
from .view import StandIn


class AdaptedLayer(StandIn):
    """Replaces an adapted layer in a view.

    It computes `variant.apply(x, layer(variant.transform_input(x)))`. The trainable leaves are
    buffers called `lora_<name>`: the keys of the flat dict are paths in the view, and
    `torch.func.functional_call(view, params, ...)` works too.
    """

    def __init__(self, layer: nn.Module, site: Site, params: Mapping[str, Tensor]):
        if isinstance(layer, AdaptedLayer):
            raise LoraFuncError(
                f"{site.path!r} carries an adapter already: the model is a bound view. Use the "
                "base model, or merge the first adapter into its weights (lf.merge)"
            )
        super().__init__(layer)
        for name, (key, _) in site.leaves.items():
            self._buffers[f"lora_{name}"] = params[key]
        self.__dict__["_site"] = site  # underscored: other attributes are those of the layer

    def settle(self, call: bool) -> None:
        """Reads the layer, once the view is complete. `call`: the view is for one call only."""
        leaves = [leaf for leaf in self._buffers.values() if leaf is not None]
        trains = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
        weight = weight_of(self._modules["layer"], self._site.transposed)
        self.__dict__["_weight"] = weight
        self.__dict__["_expects_grad"] = call and trains
        self.__dict__["_kept"] = Kept(self.prepared_ahead(), None) if call else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        variant, weight = self._site.variant, self._weight
        p = self.entries(x.dtype)
        x = self.admit(x, p)
        z = x
        if overrides(variant, "transform_input"):
            z = each(variant.transform_input, (x,), p)
        base_out = self.layer(z, *args, **kwargs)
        if not overrides(variant, "apply"):
            return base_out
        if base_out.dtype != x.dtype:
            p = self.entries(torch.promote_types(x.dtype, base_out.dtype))
        return each(lambda x, y, p: variant.apply(x, y, weight, p), (x, base_out), p)

    def admit(self, x: Tensor, p: Entries) -> Tensor:
        """`x` where the parameters are. Raises LoraFuncError if the adapter cannot act on it."""
        path = self._site.path
        if self._expects_grad and not torch.is_grad_enabled():
            raise LoraFuncError(
                f"gradients are switched off inside the model where it calls {path!r}, so its "
                "adapter would get none. With activation checkpointing, pass use_reentrant=False; "
                "otherwise leave this layer out of the targets, or call under torch.no_grad()"
            )
        first = next(iter(p.params.values()), x)
        x = accelerate.moved_input(self.layer, x, first.device)
        if p.own:
            n = p.params[p.own[0]].shape[0]
            if x.dim() < 2 or x.shape[0] != n:
                raise LoraFuncError(
                    f"{path!r} sees an input of shape {tuple(x.shape)}, whose first axis is not "
                    f"that of the {n} examples for which it has parameters: the batch has another "
                    "size, or the model moves its examples before this layer (time first, tokens "
                    "flattened, experts). Leave the layer out of the targets, or give it "
                    "parameters without the example axis"
                )
        return x

    def entries(self, dtype: torch.dtype) -> Entries:
        """The parameters for an input of `dtype`, prepared if the variant prepares any.

        In a call they were prepared with the view: activation checkpointing repeats none of it.
        A bound view keeps them until a tensor that they come from changes, unless a leaf requires
        grad. Such leaves are also written to through `.data`, which nothing can see.
        """
        kept, traced = self._kept, in_transform() or torch.compiler.is_compiling()
        if kept is not None and kept.entries.serves(dtype):
            if kept.sources is None or (not traced and kept.is_current(self)):
                return kept.entries
        site, plain = self._site, self.plain()
        if not overrides(site.variant, "prepare"):
            return plain
        if traced:
            return prepare(site.variant, self._weight, plain, dtype)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():  # to be of use outside of it too
                entries = prepare(site.variant, self._weight, plain, dtype)
        else:
            entries = prepare(site.variant, self._weight, plain, dtype)
        if not any(leaf.requires_grad for leaf in plain.params.values()):
            self.__dict__["_kept"] = Kept(entries, self.sources())
        return entries

    def plain(self) -> Entries:
        """The parameters as they are now."""
        leaves: dict[str, Any] = {n: self._buffers[f"lora_{n}"] for n in self._site.leaves}
        own = [n for n, (_, axes) in self._site.leaves.items() if leaves[n].dim() > axes]
        return Entries({**leaves, **self._site.frozen}, tuple(own), None)

    def prepared_ahead(self) -> Entries:
        """The parameters, prepared before any input, for the dtype that it most likely has.

        Under autocast, or if that is unknown, in float32: casts to another dtype then come last.
        """
        plain, variant, weight = self.plain(), self._site.variant, self._weight
        if not overrides(variant, "prepare") or not weight.at_hand:
            return plain
        dtype = weight.input_dtype or torch.float32
        if autocast_on(weight.device):
            dtype = torch.promote_types(dtype, torch.float32)
        return prepare(variant, weight, plain, dtype)

    def sources(self) -> tuple[tuple[Any, ...], ...]:
        """Each tensor that the parameters may be prepared from, as (tensor, version, ..)."""
        own = self._weight.layer._parameters
        reads = own.values() if self._site.variant.card.reads == "rows" else [own.get("bias")]
        tensors = [t for t in (*self._buffers.values(), *reads) if t is not None]
        return tuple((t, version(t), t.data_ptr(), t.device, t.dtype) for t in tensors)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


class Kept(NamedTuple):
    """Prepared parameters, and their `sources`. None: they hold for the whole call."""

    entries: Entries
    sources: tuple[tuple[Any, ...], ...] | None

    def is_current(self, layer: AdaptedLayer) -> bool:
        """Whether nothing that they were prepared from has changed."""
        if self.sources is None:
            return True
        now = layer.sources()
        return len(now) == len(self.sources) and all(
            new[0] is old[0] and new[1:] == old[1:] for new, old in zip(now, self.sources)
        )


def version(t: Tensor) -> object:
    """A value that differs after every change of `t` in place."""
    return object() if t.is_inference() else t._version  # inference tensors are not counted


def overrides(variant: Variant, method: str) -> bool:
    """Whether the variant has a method of its own: under vmap, even the identity costs 0.1 ms."""
    return getattr(type(variant), method) is not getattr(Variant, method)
