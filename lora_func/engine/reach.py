"""Which targets a call reached. What is adapted and never used trains in vain.

A layer that did not run is no error in itself: an expert may have got no tokens, and a decoder
keeps the keys of its encoder. It is an error if its parent reads its weight instead of calling
it. It is suspicious if its parent ran and it has never run itself, so parents are watched until
each layer has run once, and again when they have changed: diffusers fuses q, k and v of a model in
use.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import LoraFuncError, listing
from ..variant import Weight
from ..weights.parameter import ParameterWeight
from .holder import Holder
from .layer import AdaptedLayer
from .tensor import AdaptedTensor

LISTS = (nn.ModuleList, nn.ModuleDict)  # they have no forward, and route to some of their children


class View(NamedTuple):
    """A view of a model, and what is adapted in it."""

    module: nn.Module
    layers: list[AdaptedLayer]
    tensors: list[AdaptedTensor]
    parameters: dict[str, ParameterWeight]  # path of a target -> what the model holds there
    versions: list[tuple[Tensor, int]]  # of the tensors that view and model share

    def weights(self) -> dict[str, tuple[Tensor | None, Weight]]:
        """path of a target -> the tensor that the model holds, and its `Weight`."""
        own = {layer._site.path: (layer.stored, layer._weight) for layer in self.layers}
        return {**own, **{path: (w.stored, w) for path, w in self.parameters.items()}}


class Parents:
    """The modules that are to call adapted layers, as they were when last looked at."""

    def __init__(self) -> None:
        self.targets: dict[str, list[str]] = {}  # path of a parent -> paths of its targets
        self.forms: dict[str, tuple[Any, ...]] = {}  # path of a parent -> see `form`

    def __reduce__(self) -> tuple[Any, ...]:
        return Parents, ()

    def changed(self, model: nn.Module, holders: Sequence[Holder]) -> set[str]:
        """The targets in `model` whose parents have changed since the last look; at first, none."""
        if not self.targets:
            for holder in holders:
                if (parent := caller(model, holder.place)) is not None:
                    self.targets.setdefault(parent, []).append(holder._site.path)
        forms = {parent: form(module_at(model, parent)) for parent in self.targets}
        old, self.forms = self.forms or forms, forms
        changed = [parent for parent in forms if forms[parent] != old[parent]]
        return {path for parent in changed for path in self.targets[parent]}


@dataclass
class Seen:
    """What is known of one adapter on one model."""

    ran: set[str] = field(default_factory=set)  # paths of targets that have run, or were read
    told: set[str] = field(default_factory=set)  # paths of targets that a warning named
    parents: Parents = field(default_factory=Parents)  # in the model

    def forget(self, paths: set[str]) -> None:
        """Targets that are to be watched again."""
        self.ran -= paths
        self.told -= paths


class Reach:
    """What is known of one adapter on each model that it was called on."""

    def __init__(self) -> None:
        self.seen: weakref.WeakKeyDictionary[nn.Module, Seen] = weakref.WeakKeyDictionary()

    def watch(self, model: nn.Module, view: View, *, kept: bool) -> Watch:
        """Watches a view of `model`, whose forward is to use all targets.

        `kept`: whether the view lives on. Then it may change, and otherwise the model may.
        """
        seen = self.seen.setdefault(model, Seen())
        seen.forget(seen.parents.changed(model, [*view.layers, *view.tensors]))
        return Watch(seen, view, kept)

    def __reduce__(self) -> tuple[Any, ...]:
        return Reach, ()


class Watch:
    """Looks, after a forward of a view, for targets that have never been used."""

    def __init__(self, seen: Seen, view: View, kept: bool):
        self.seen = seen
        self.view, self.layers, self.tensors = view.module, view.layers, view.tensors
        self.kind = type(view.module).__name__
        self.own = Parents()  # in the view
        self.parents: dict[str, Parent] = {}  # by path
        if kept:
            self.own.changed(self.view, [*self.layers, *self.tensors])
        self.attach()

    def attach(self) -> None:
        """Watches the parents of the layers that are not known to have run."""
        self.pending = [layer for layer in self.layers if layer._site.path not in self.seen.ran]
        for layer in self.pending:
            parent = caller(self.view, layer._site.path)
            if parent is not None and parent not in self.parents:
                self.parents[parent] = Parent(self.view.get_submodule(parent), parent)

    def begin(self, training: bool) -> None:
        """Before each forward of a bound view: looks for changes, and forgets what ran last.

        The latter only in training: threads that serve one view share what it notes.
        """
        changed = self.own.changed(self.view, [*self.layers, *self.tensors])
        for tensor in self.tensors:
            if tensor._site.path in changed:
                tensor.__dict__["_read"] = False
        for layer in self.layers:
            if training or layer._site.path in changed:
                layer.__dict__.update(_ran=False, _read=False)
        if changed:
            self.seen.forget(changed)
            self.attach()

    def check(self) -> None:
        """Raises or warns if a target that was to be used was not."""
        self.check_layers()
        self.check_tensors()

    def check_tensors(self) -> None:
        """The same, for parameters: one that no module reads is suspicious."""
        seen = self.seen
        seen.ran.update(tensor._site.path for tensor in self.tensors if tensor._read)
        paths = [tensor._site.path for tensor in self.tensors]
        untold = [path for path in paths if path not in seen.ran and path not in seen.told]
        if not untold:
            return
        if not seen.ran:
            raise LoraFuncError(
                f"{self.kind} ran, but read none of the adapted parameters, {listing(untold)}. The "
                "adapter has no effect. The model uses other tensors in their place; adapt those"
            )
        seen.told.update(untold)
        warnings.warn(
            f"adapted, but not read: {listing(untold)}. The adapter had no effect there. Unless "
            f"{self.kind} reads it for other inputs, leave it out, as in Targets(exclude=..)",
            stacklevel=4,
        )

    def check_layers(self) -> None:
        """The same, for layers."""
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
                "calls the layer, so its adapter has no effect. Adapt the parameter instead, as in "
                f"Targets(parameters=({paths[0] + '.weight'!r},)), or leave the layer out"
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


def caller(model: nn.Module, path: str) -> str | None:
    """The path of the module that is to call the layer at `path`. None if no module has one."""
    parent = path
    while parent:
        parent = parent.rpartition(".")[0]
        module = module_at(model, parent)
        if module is None:  # inside of another adapted layer
            return None
        if not isinstance(module, LISTS):
            return parent
    return None


def module_at(model: nn.Module, path: str) -> Any:
    """`model.get_submodule(path)` in a tenth of its time, as each call asks; None if it fails."""
    module: Any = model
    for name in path.split(".") if path else ():
        inner = module._modules.get(name)
        module = getattr(module, name, None) if inner is None else inner
        if not isinstance(module, nn.Module):
            return None
    return module


def form(module: nn.Module | None) -> tuple[Any, ...]:
    """What a module calls, as far as its attributes tell: children, kinds of helpers, switches."""
    if module is None:  # removed
        return ()
    held = vars(module)
    switches = [v for name, v in held.items() if (v is True or v is False) and name != "training"]
    return (*module._modules, *map(type, held.values()), *switches)


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
