"""The view: a structural copy of a model in which some layers are replaced.

The model itself is never touched. All modules are copied but torch's own layers, whose forward
writes to nothing (nn.Linear, nn.LayerNorm, ..). A copy of a module is a new object of the same
class, with a copy of the original's `__dict__`, of its tables of hooks, and of the containers among
its attributes. So what a forward writes to its module stays in the view: caches, hooks, attributes.
Weights, the hooks themselves, and buffers are shared; in train mode a view has buffers of its
own, which a forward updates as nn.BatchNorm does. Parameters that require grad are held detached,
so the base is frozen.

Every call builds a new view, in a few milliseconds. So it follows the model as it is now: in
train or eval mode, moved, patched, checkpointed. Calls share nothing, so threads and nested
transforms cannot meet. Building it is plain Python that torch.compile traces; a compiled call
guards on the model and is traced again when the model changes. A trace copies only what must
differ, because each module that it has not met costs it a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..libraries import dynamo, fsdp, torch_hooks, transformers
from ..weights.table import class_in_view, kind_of
from .rebind import PLAIN, Rebinding, check_globals

MODULE_STATE = frozenset(nn.Module().__dict__)  # what every module has
# Its dicts and sets, of which a copy has its own. FSDP gathers weights into `_parameters`.
TABLES = tuple(
    name
    for name, value in nn.Module().__dict__.items()
    if isinstance(value, (dict, set)) and name not in ("_parameters", "_modules")
)
# Those that a forward may add to.
WRITTEN = tuple(name for name in TABLES if "state_dict" not in name)


def make_view(
    model: nn.Module,
    replace: Mapping[str, Callable[[nn.Module], nn.Module]],
    traceable: dynamo.Traceable,
    keep: bool = False,
    tensors: Mapping[int, Any] | None = None,
) -> tuple[nn.Module, list[str], list[tuple[Tensor, int]]]:
    """A structural copy of `model` with `replace[path](module)` for the module at each path.

    A module that stands in the tree twice is copied once, and stays in both places. `keep`: the
    view outlives a call, so its parameters and buffers are objects of its own, which a user may
    move and cast; they share their memory with the model's until then. `tensors`: id of a
    parameter -> the module that shows one in its place; in a trace, that tensor itself.

    Returns the copy, the paths of `replace` that the model does not have, and the tensors that the
    two share, each with its version.
    """
    structure = Structure(replace, keep, traceable.survey(model), tensors or {})
    view = structure.visit(model, "")
    if structure.traced and structure.survey is not None:
        structure.survey.check(structure.replaced)
    rebinding = Rebinding(structure.new)
    for module, copy, own in structure.copies:
        replacement = structure.new[id(module)]
        # A layer's own attributes resolve to the bare copy, everyone else's to the wrapper.
        structure.new[id(module)] = copy
        attributes = traceable.attributes(model, module)
        if structure.traced:  # dynamo follows one attribute after the other
            for name, value in attributes.items():
                copy.__dict__[name] = value
        else:
            copy.__dict__.update(attributes)
        for name in TABLES if keep else WRITTEN:  # what is registered on a copy stays there
            table = attributes[name]
            copy.__dict__[name] = table.copy() if table else type(table)()
        own_names = list(attributes) if structure.traced else attributes.keys() - MODULE_STATE
        for name in own_names:
            value = attributes[name]
            if name not in MODULE_STATE and type(value) not in PLAIN and name not in own:
                if name == "forward":
                    check_globals(value, rebinding, module)
                copy.__dict__[name] = rebinding.attribute(value)
        for name, value in traceable.bound_methods(module, copy).items():
            copy.__dict__[name] = value
        for name, value in own.items():
            copy.__dict__[name] = value
        structure.new[id(module)] = replacement
    return view, list(structure.missing), structure.versions


class Structure:
    """The first pass of `make_view`: which modules are copied. The copies are still empty.

    A view to keep has copies of all. A call shares torch's own layers, whose forward writes to
    nothing. A trace copies only what must differ.
    """

    def __init__(
        self,
        replace: Mapping[str, Callable[[nn.Module], nn.Module]],
        keep: bool,
        survey: Any,
        tensors: Mapping[int, Any],
    ):
        self.tensors = tensors
        self.replace = replace
        self.keep = keep
        self.survey = survey  # what is known of the model, or None
        self.traced = torch.compiler.is_compiling()
        self.whole = not (self.traced or torch_hooks.caching_weights())
        self.missing = dict.fromkeys(replace)
        self.versions: list[tuple[Tensor, int]] = []  # of the tensors that view and model share
        # (original, copy, attributes of the copy alone)
        self.copies: list[tuple[nn.Module, nn.Module, dict[str, Any]]] = []
        # id of an original module, parameter or buffer -> its replacement in the view
        self.new: dict[int, Any] = dict(tensors)
        self.replaced: dict[int, bool] = {}  # ids of modules that are another object in the view

    def visit(self, module: nn.Module, path: str, hooked: tuple[type, ...] = ()) -> nn.Module:
        """The replacement of `module`. Modules of the classes `hooked` are copied."""
        if id(module) in self.new:
            return self.new[id(module)]
        if not self.keep and transformers.records_outputs(module):
            hooked = transformers.recorded_classes(module)
        children, kind = {}, class_in_view(module)
        for name, child in module._modules.items():
            if child is not None:
                replacement = self.visit(child, f"{path}.{name}" if path else name, hooked)
                if replacement is not child:
                    children[name] = replacement
        parameters = self.parameters(module, path)
        apart = self.survey is not None and id(module) in self.survey.apart
        buffers = self.buffers(module, apart and self.traced) if kind is type(module) else {}
        shown = self.shown(module) if self.tensors else {}
        kind = showing(kind, tuple(shown)) if shown else kind
        special = apart or kind is not type(module) or isinstance(module, hooked)
        computed = module._forward_pre_hooks and torch_hooks.weight_hooks(module)
        replacement = module
        shares = self.survey is not None and torch_hooks.is_stateless(module)
        whole = self.keep or (self.whole and not shares)
        if whole or children or parameters or buffers or special or computed:
            torch_hooks.check_cache(module, path)
            replacement = object.__new__(kind)
            own: dict[str, Any] = {"_modules": {**module._modules, **children, **shown}}
            if parameters or shown:
                held = {**module._parameters, **parameters}
                own["_parameters"] = {n: p for n, p in held.items() if n not in shown}
            if buffers:
                own["_buffers"] = {**module._buffers, **buffers}
            if children or shown:
                own |= torch_hooks.without_fused_path(module)
            if shown:
                own |= torch_hooks.without_lists(module)
            self.copies.append((module, replacement, own))
        if path in self.missing:
            del self.missing[path]
            replacement = self.replace[path](replacement)
        self.new[id(module)] = replacement
        if replacement is not module:
            self.replaced[id(module)] = True
        return replacement

    def parameters(self, module: nn.Module, path: str) -> dict[str, Tensor]:
        """The parameters of a module that its copy holds as another object."""
        found = {}
        for name, parameter in module._parameters.items():
            self.note(parameter)
            if parameter is None:
                continue
            if id(parameter) in self.tensors:
                if isinstance(self.tensors[id(parameter)], Tensor):
                    found[name] = self.tensors[id(parameter)]
            elif parameter.requires_grad or self.keep:
                if id(parameter) not in self.new:
                    self.new[id(parameter)] = frozen(parameter, path, self.keep)
                if self.new[id(parameter)] is not parameter:
                    found[name] = self.new[id(parameter)]
        return found

    def shown(self, module: nn.Module) -> dict[str, nn.Module]:
        """The parameters of a module that other modules show, by name."""
        return {
            name: self.tensors[id(parameter)]
            for name, parameter in module._parameters.items()
            if parameter is not None and isinstance(self.tensors.get(id(parameter)), nn.Module)
        }

    def buffers(self, module: nn.Module, apart: bool) -> dict[str, Tensor]:
        """The buffers of a module that its copy holds as copies, since a forward may write them."""
        found = {}
        if not module._buffers or (module._parameters.keys() <= {"bias"} and kind_of(module)):
            return found  # a packed matrix is no state
        written = module.training and (self.whole or torch_hooks.writes_buffers(module))
        # A call notices what is written in eval mode, and raises. A trace cannot.
        if written or apart or self.keep:
            for name, buffer in module._buffers.items():
                if type(buffer) is Tensor and not buffer.is_meta:
                    if id(buffer) not in self.new:
                        self.new[id(buffer)] = buffer.clone()
                    found[name] = self.new[id(buffer)]
        else:
            for buffer in module._buffers.values():
                self.note(buffer)
        return found

    def note(self, t: Tensor | None) -> None:
        """Notes the version of a tensor, outside of a trace."""
        if t is None or not self.whole or type(t) not in (Tensor, nn.Parameter):
            return
        if not t.is_inference():
            self.versions.append((t, t._version))


def frozen(parameter: Tensor, path: str, keep: bool) -> Tensor:
    """What a view holds for a parameter of the module at `path`: it does not require grad.

    A frozen parameter of another class, such as a packed one, is returned as it is. Raises
    LoraFuncError if the parameter is sharded and requires grad.
    """
    if keep and type(parameter) is nn.Parameter and not parameter.is_meta:
        return twin(parameter)
    if not parameter.requires_grad:
        return parameter
    if parameter.is_meta:  # accelerate, which offloads it, makes another of its class
        return nn.Parameter(parameter.detach(), requires_grad=False)
    if type(parameter) is not nn.Parameter:
        fsdp.check_frozen(parameter, path)
    return parameter.detach()


def twin(parameter: Tensor) -> Tensor:
    """A frozen parameter with the memory of another, and its count of versions."""
    alone = parameter.detach()  # nn.Parameter(..) would count for itself before torch 2.13
    alone._is_param = True  # pyright: ignore  (so nn.Parameter knows a tensor that it did not make)
    return alone


CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def showing(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a module's class, in which its parts `names` show the parameters so called."""

    def shows(name: str) -> property:
        return property(lambda module: module._modules[name].tensor())

    def reduced(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return (empty, (kind, names), *kind.__reduce_ex__(module, protocol)[2:])  # pyright: ignore

    if (kind, names) not in CLASSES:
        own: dict[str, Any] = {name: shows(name) for name in names}
        own |= torch_hooks.lists_made(kind)
        own |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        CLASSES[kind, names] = type(kind.__name__, (kind,), {**own, "__reduce_ex__": reduced})
    return CLASSES[kind, names]


def empty(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """A module of such a class, for pickle, which finds classes by their names."""
    return object.__new__(showing(kind, names))


class StandIn(nn.Module):
    """Replaces a layer in a view. It has all attributes of the layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        # Into the dicts directly: `nn.Module.__setattr__` would take longer than the whole view.
        self._modules["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)
