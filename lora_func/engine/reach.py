"""Which adapted layers a call reached. A layer that is adapted and never runs trains in vain.

A layer that did not run is no error in itself: an expert may have got no tokens, and a decoder
keeps the keys of its encoder. It is an error if its parent reads its weight instead of calling
it. It is suspicious if its parent ran and it has never run itself, so parents are watched until
each layer has run once.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import LoraFuncError, listing
from .layer import AdaptedLayer

LISTS = (nn.ModuleList, nn.ModuleDict)  # they have no forward, and route to some of their children


@dataclass
class Seen:
    """What is known of one adapter on one model."""

    ran: set[str] = field(default_factory=set)  # paths of layers that have run
    told: set[str] = field(default_factory=set)  # paths of layers that a warning named


class Reach:
    """What is known of one adapter on each model that it was called on."""

    def __init__(self) -> None:
        self.seen: weakref.WeakKeyDictionary[nn.Module, Seen] = weakref.WeakKeyDictionary()

    def watch(self, model: nn.Module, view: nn.Module, layers: Sequence[AdaptedLayer]) -> Watch:
        """Watches a view of `model`, whose forward is to call all `layers`."""
        return Watch(self.seen.setdefault(model, Seen()), view, layers)

    def __reduce__(self) -> tuple[Any, ...]:
        return Reach, ()


class Watch:
    """Looks, after a forward of a view, for adapted layers that have never run."""

    def __init__(self, seen: Seen, view: nn.Module, layers: Sequence[AdaptedLayer]):
        self.seen = seen
        self.kind = type(view).__name__
        self.layers = layers
        self.pending = [layer for layer in layers if layer._site.path not in seen.ran]
        self.parents: dict[str, Parent] = {}  # by path
        for layer in self.pending:
            self.attach(view, layer._site.path)

    def attach(self, view: nn.Module, path: str) -> None:
        """Watches the module that is to call the layer at `path`."""
        parent, module = path, None
        while parent and (module is None or isinstance(module, LISTS)):
            parent = parent.rpartition(".")[0]
            try:
                module = view.get_submodule(parent)
            except AttributeError:  # inside of another adapted layer
                return
        if module is not None and not isinstance(module, LISTS) and parent not in self.parents:
            self.parents[parent] = Parent(module, parent)

    def begin(self) -> None:
        """Before each forward of a bound view: forgets what ran in the last one."""
        for layer in self.layers:
            layer.__dict__.update(_ran=False, _read=False)

    def check(self) -> None:
        """Raises or warns if a layer that was to run did not."""
        seen = self.seen
        if read := [layer for layer in self.layers if layer._read and not layer._ran]:
            paths = [layer._site.path for layer in read if layer._site.path in seen.ran]
            if paths:
                raise LoraFuncError(
                    f"{self.kind} read the weight of {listing(paths)} and did not call the layer "
                    "this time, so its adapter had no effect. A loss that is computed without "
                    "logits reads the head so. Leave the layer out, as in Targets(exclude=..)"
                )
        if not self.pending:
            return
        seen.ran.update(layer._site.path for layer in self.pending if layer._ran)
        self.pending = [layer for layer in self.pending if layer._site.path not in seen.ran]
        idle = {layer: parent for layer in self.pending if (parent := self.idle(layer)) is not None}
        if not self.pending:
            for parent in self.parents.values():
                parent.handle.remove()
            self.parents = {}
        if read := [layer for layer in idle if layer._read]:
            parent, paths = idle[read[0]], [layer._site.path for layer in read]
            raise LoraFuncError(
                f"{parent.kind} {parent.path!r} reads the weight of {listing(paths)} and never "
                "calls the layer, so its adapter has no effect. Leave it out, as in "
                f"Targets(exclude=..); what acts there is the parameter {paths[0] + '.weight'!r}"
            )
        untold = [layer._site.path for layer in idle if layer._site.path not in seen.told]
        if untold and not seen.ran:
            raise LoraFuncError(
                f"{self.kind} ran, but called none of the adapted layers, {listing(untold)}. "
                "The adapter has no effect. The model keeps these layers elsewhere, replaces them "
                "or does not use them; adapt those that it calls"
            )
        seen.told.update(untold)
        if untold:
            warnings.warn(
                f"adapted, but not called while its parent ran: {listing(untold)}. The adapter had "
                f"no effect there. Unless {self.kind} uses it for other inputs, leave it out, as "
                "in Targets(exclude=..)",
                stacklevel=4,
            )
        elif not seen.ran and "" not in seen.told:
            seen.told.add("")
            warnings.warn(
                f"{self.kind} ran, but none of the adapted layers did, so the adapter had no "
                "effect. Unless other inputs reach them, the model calls layers that the adapter "
                "does not know: lf.probe tells which are inert",
                stacklevel=4,
            )

    def idle(self, layer: AdaptedLayer) -> Parent | None:
        """The parent of a layer that did not call it, if the parent ran and did not choose."""
        path = layer._site.path
        parent = next((p for p in above(path) if p in self.parents), None)
        if parent is None or not self.parents[parent].ran:
            return None
        within = path.rpartition(".")[0]
        chosen = within != parent and any(p.startswith(f"{within}.") for p in self.seen.ran)
        return None if chosen and not layer._read else self.parents[parent]


class Parent:
    """Notes whether a module ran."""

    def __init__(self, module: nn.Module, path: str):
        self.path, self.kind, self.ran = path, type(module).__name__, False
        self.handle = module.register_forward_pre_hook(self.note)

    def note(self, *_: Any) -> None:
        """The hook."""
        self.ran = True


def above(path: str) -> list[str]:
    """The paths of the modules around `path`, from the inside: "a.b.c" -> ["a.b", "a", ""]."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1)] if path else []
