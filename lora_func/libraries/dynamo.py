"""torch.compile: what dynamo cannot trace of the way a view is built."""

from __future__ import annotations

import types
import weakref
from typing import Any

import torch
from torch import nn

RELIES_ON = {
    "torch._dynamo.eval_frame": ("source:_torchdynamo_orig_callable",),
    "torch.compiler": ("is_compiling",),
}

TORCH_2_13 = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
"""Before it, dynamo cannot iterate over `module.__dict__`, though it can over a dict that it meets
as a value. And it cannot bind a method."""


class Traceable:
    """What a trace of a view needs to know of a model, noted outside of any trace."""

    def __init__(self) -> None:
        self.dicts: dict[int, dict[int, dict[str, Any]]] = {}  # by id of the model, of the module
        self.methods: dict[type, tuple[str, ...]] = {}  # class -> names of its own methods
        self.surveys: dict[int, Any] = {}  # by id of the model

    def note(self, model: nn.Module, survey: Any) -> None:
        """Notes a model, for as long as it lives. Modules that are added later are unknown.

        `survey` is what a caller found out about it.
        """
        if id(model) not in self.surveys:
            weakref.finalize(model, self.surveys.pop, id(model), None)
            weakref.finalize(model, self.dicts.pop, id(model), None)
        self.surveys[id(model)] = survey
        if not TORCH_2_13:
            self.dicts[id(model)] = {id(module): module.__dict__ for module in model.modules()}
        for module in model.modules():
            if type(module) not in self.methods:
                self.methods[type(module)] = own_methods(type(module))

    def knows(self, model: nn.Module) -> bool:
        """Whether a model has been noted."""
        return id(model) in self.surveys

    def attributes(self, model: nn.Module, module: nn.Module) -> dict[str, Any]:
        """The `__dict__` of a module of the model."""
        if TORCH_2_13 or not torch.compiler.is_compiling():
            return module.__dict__
        return self.dicts[id(model)][id(module)]

    def survey(self, model: nn.Module) -> Any:
        """What was noted of the model, or None."""
        return self.surveys.get(id(model))

    def bound_methods(self, module: nn.Module, copy: nn.Module) -> dict[str, Any]:
        """The methods of a module's class, bound to its copy. Empty unless dynamo traces.

        Found on the copy itself, a method has no origin that dynamo knows, and then
        `inspect.signature(self.method)` fails, as transformers' apply_chunking_to_forward calls it.
        Before torch 2.13 it does fail: BERT and its like do not compile there.
        """
        if not TORCH_2_13 or not torch.compiler.is_compiling():
            return {}
        kind = type(module)
        return {name: getattr(kind, name).__get__(copy) for name in self.methods.get(kind, ())}


def own_methods(kind: type) -> tuple[str, ...]:
    """Names of the methods that a model's author wrote for a class, without `forward`."""
    foreign = ("torch.", "transformers.modeling_utils", "transformers.generation")
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if base is object or base.__module__.startswith(foreign):
            continue
        for name, value in vars(base).items():
            dunder = name.startswith("__") or name == "forward"
            if isinstance(value, types.FunctionType) and not dunder:
                names[name] = None
    return tuple(names)


def uncompiled(function: Any) -> Any:
    """The function that torch.compile wrapped, or None.

    Its guards are on the original modules, so it would be traced anew for each view.
    """
    return getattr(function, "_torchdynamo_orig_callable", None)
