"""Attributes of a copied module that refer to original modules, made to refer to their copies.

accelerate, for one, sets `module.forward = partial(new_forward, module)`. Kept as it is, it would
run the original children, and every adapter below would be silently inert.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraFuncError
from ..libraries import dynamo

PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
"""Types that refer to nothing."""


def rebound(value: Any, new: Mapping[int, Any]) -> Any:
    """`value` with every module and parameter in `new` replaced; `value` itself if it has none.

    `new` is id -> replacement. Containers are searched one level deep, functions in what they
    close over.
    """
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is list or kind is tuple:
        items = [rebound_item(item, new) for item in value]
        changed = any(item is not old for item, old in zip(items, value))
        return kind(items) if changed else value
    if kind is dict or kind is OrderedDict:
        entries = {name: rebound_item(item, new) for name, item in value.items()}
        changed = any(item is not value[name] for name, item in entries.items())
        return kind(entries) if changed else value
    return rebound_item(value, new)


def rebound_item(value: Any, new: Mapping[int, Any]) -> Any:
    """The same for a value that is no container."""
    kind = type(value)
    if kind is types.MethodType:
        return rebound_method(value, new)
    if kind is functools.partial:
        function = rebound_item(value.func, new)
        args, kwargs = rebound(value.args, new), rebound(value.keywords, new)
        same = function is value.func and args is value.args and kwargs is value.keywords
        return value if same else functools.partial(function, *args, **kwargs)
    if kind is types.FunctionType:
        return rebound_function(value, new)
    if issubclass(kind, (nn.Module, Tensor)):  # not isinstance, which would ask a proxy object
        return new.get(id(value), value)
    return value


def rebound_method(value: Any, new: Mapping[int, Any]) -> Any:
    """A bound method, bound to the replacement of its owner."""
    owner = rebound_item(value.__self__, new)
    if owner is value.__self__:
        return value
    function: Any = value.__func__  # a function, or another callable
    name = getattr(function, "__name__", "")
    if getattr(type(value.__self__), name, None) is function:
        # The replacement may have a method of its own: AdaptedLayer's forward.
        function = getattr(type(owner), name, function)
    return types.MethodType(function, owner)


def rebound_function(function: Any, new: Mapping[int, Any]) -> Any:
    """A function that closes over modules: `old = m.forward; m.forward = lambda x: old(x)`."""
    compiled = dynamo.uncompiled(function)
    if compiled is not None:
        original = rebound_item(compiled, new)
        return function if original is compiled else original
    if not function.__closure__ or id(function) in new:
        return function
    new = {**new, id(function): function}  # functions may close over each other
    cells = tuple(rebound_cell(cell, new) for cell in function.__closure__)
    if all(cell is old for cell, old in zip(cells, function.__closure__)):
        return function
    code, scope = function.__code__, function.__globals__
    twin = types.FunctionType(code, scope, function.__name__, function.__defaults__, cells)
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__dict__.update(function.__dict__)
    return twin


def rebound_cell(cell: Any, new: Mapping[int, Any]) -> Any:
    """A cell of a closure."""
    try:
        value = cell.cell_contents
    except ValueError:  # still empty
        return cell
    replacement = rebound(value, new)
    return cell if replacement is value else types.CellType(replacement)


def check_globals(forward: Any, new: Mapping[int, Any], module: nn.Module) -> None:
    """Raises LoraFuncError if a `forward` set on a module reaches an original by a global name.

    This happens in notebooks. No call can replace a global for itself alone.
    """
    function = getattr(forward, "__func__", forward)
    if type(function) is not types.FunctionType:
        return
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if value is not None and rebound(value, new) is not value:
            raise LoraFuncError(
                f"the forward that was set on a {type(module).__name__} reaches the model by the "
                f"global name {name!r}, so adapters would be inert. Set it as "
                "types.MethodType(forward, module), and have it call type(module).forward(self, ..)"
            )
