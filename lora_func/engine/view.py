"""The view: a structural copy of a model in which some layers are replaced.

The model itself is never touched. Copied is only what must differ: the containers on the way to a
replaced layer; modules whose parameters require grad, which the copy holds detached, so the base
is frozen; layers with packed weights; and modules that transformers is about to hook. A copy is a
new object with a copy of the original's `__dict__` and of its tables of hooks. Weights, buffers,
the hooks themselves and all other modules are shared.

Every call builds a view anew, in a millisecond or two. So it follows the model as it is now: in
train or eval mode, moved, patched, checkpointed. Calls share nothing, so threads and nested
transforms cannot meet. Building it is plain Python that torch.compile traces; a compiled call
guards on the model and is traced again when the model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..libraries import dynamo, fsdp, torch_hooks, transformers
from ..weights.table import class_in_view
from .rebind import PLAIN, check_globals, rebound

MODULE_STATE = frozenset(nn.Module().__dict__)  # what every module has
HOOKS = frozenset(name for name in MODULE_STATE if "_hooks" in name)


def make_view(
    model: nn.Module,
    replace: Mapping[str, Callable[[nn.Module], nn.Module]],
    traceable: dynamo.Traceable,
    whole: bool = False,
) -> tuple[nn.Module, list[str]]:
    """A structural copy of `model` with `replace[path](module)` for the module at each path.

    A module that stands in the tree twice is copied once, and stays in both places. `whole` copies
    every module, so that a user may call `eval()` on the result. Returns the copy, and the paths
    of `replace` that the model does not have.
    """
    structure = Structure(replace, whole)
    view = structure.visit(model, "")
    new = structure.new
    for module, copy, own in structure.copies:
        replacement = new[id(module)]
        # A layer's own attributes resolve to the bare copy, everyone else's to the wrapper.
        new[id(module)] = copy
        for name, value in traceable.attributes(model, module).items():
            if name in HOOKS:  # what is registered on a copy stays there
                value = value.copy() if value else type(value)()  # noqa: PLW2901
            elif name not in MODULE_STATE and type(value) not in PLAIN:
                if name == "forward":
                    check_globals(value, new, module)
                value = rebound(value, new)  # noqa: PLW2901
            copy.__dict__[name] = value
        for name, value in traceable.bound_methods(module, copy).items():
            copy.__dict__[name] = value
        for name, value in own.items():
            copy.__dict__[name] = value
        new[id(module)] = replacement
    return view, list(structure.missing)


class Structure:
    """The first pass of `make_view`: which modules are copied. The copies are empty still."""

    def __init__(self, replace: Mapping[str, Callable[[nn.Module], nn.Module]], whole: bool):
        self.replace = replace
        self.whole = whole
        self.missing = dict.fromkeys(replace)
        # (original, copy, attributes of the copy alone)
        self.copies: list[tuple[nn.Module, nn.Module, dict[str, Any]]] = []
        # id of an original module or parameter -> its replacement in the view
        self.new: dict[int, Any] = {}

    def visit(self, module: nn.Module, path: str, hooked: tuple[type, ...] = ()) -> nn.Module:
        """The replacement of `module` in the view. Modules of the classes `hooked` are copied."""
        if id(module) in self.new:
            return self.new[id(module)]
        if transformers.records_outputs(module):
            hooked = transformers.recorded_classes(module)
        children, detached = {}, {}
        for name, child in module._modules.items():
            if child is not None:
                replacement = self.visit(child, f"{path}.{name}" if path else name, hooked)
                if replacement is not child:
                    children[name] = replacement
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                detached[name] = self.new[id(parameter)] = frozen(parameter, path)
        kind = class_in_view(module)
        special = kind is not type(module) or isinstance(module, hooked)
        computed = module._forward_pre_hooks and torch_hooks.weight_hooks(module)
        replacement = module
        if self.whole or children or detached or special or computed:
            torch_hooks.check_cache(module, path)
            replacement = object.__new__(kind)
            own: dict[str, Any] = {"_modules": {**module._modules, **children}}
            if detached:
                own["_parameters"] = {**module._parameters, **detached}
            if children:
                own |= torch_hooks.without_fused_path(module)
            self.copies.append((module, replacement, own))
        if path in self.missing:
            del self.missing[path]
            replacement = self.replace[path](replacement)
        self.new[id(module)] = replacement
        return replacement


def frozen(parameter: Tensor, path: str) -> Tensor:
    """A detached twin of a parameter of the module at `path`. Raises LoraFuncError if sharded."""
    if type(parameter) is nn.Parameter and not parameter.is_meta:
        return parameter.detach()
    if parameter.is_meta:  # accelerate, which offloads it, makes another of its class
        return nn.Parameter(parameter.detach(), requires_grad=False)
    fsdp.check_frozen(parameter, path)
    return parameter.detach()


class StandIn(nn.Module):
    """Replaces a layer in a view. Attributes that it lacks are those of the layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        # Into the dicts directly: `nn.Module.__setattr__` would take longer than the whole view.
        self._modules["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)
