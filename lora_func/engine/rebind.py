"""Attributes of a copied module that refer to original modules, made to refer to their copies.

accelerate, for one, sets `module.forward = partial(new_forward, module)`. Kept as it is, it would
run the original children, and every adapter below would be silently inert.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping
from pickle import PicklingError
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraFuncError
from ..libraries import dynamo

PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})
"""Types that refer to nothing."""
CONTAINERS = frozenset({list, dict, OrderedDict, defaultdict, set, deque})
"""Types that a forward may fill."""
NESTED = 3  # helper objects within each other, in which references are searched


class Rebinding:
    """Replaces the modules and parameters in `new` wherever an attribute refers to them.

    `new` is id -> replacement. References are found in containers, functions (what they close
    over), methods, partials, weak references, and in the attributes of helper objects. An object
    without any is returned itself.
    """

    def __init__(self, new: Mapping[int, Any]):
        self.new = new
        # id -> (object, what replaces it). A trace knows no id of most objects, and keeps none.
        self.done: dict[int, tuple[Any, Any]] | None = None if torch.compiler.is_compiling() else {}

    def attribute(self, value: Any) -> Any:
        """The attribute of a copy. Containers are copied: a forward may fill them."""
        return self.rebound(value, fills=True)

    def rebound(self, value: Any, fills: bool = False, depth: int = 0) -> Any:
        """`value` with every reference replaced; `value` itself if it has none."""
        kind = type(value)
        if kind in PLAIN:
            return value
        if issubclass(kind, (nn.Module, Tensor)):  # not isinstance, which would ask a proxy object
            found = self.new.get(id(value), value)
            if isinstance(found, nn.Module) and issubclass(kind, Tensor):
                shown: Any = found  # an AdaptedTensor
                if shown._kept is not None:  # in a call
                    return shown.tensor()
                raise LoraFuncError(
                    f"an attribute of a module refers to the parameter {shown._site.path!r}, which "
                    "is adapted, and a bound view cannot follow it. Call the adapter instead: "
                    "adapted_forward(model, params, batch)"
                )
            return found
        if self.done is None:
            return self.replaced(value, kind, fills, depth)
        if id(value) in self.done:
            return self.done[id(value)][1]
        self.done[id(value)] = value, value  # for what refers to itself
        result = self.replaced(value, kind, fills, depth)
        self.done[id(value)] = value, result
        return result

    def replaced(self, value: Any, kind: type, fills: bool, depth: int) -> Any:
        """The same, for an object that was not met before."""
        if kind in CONTAINERS:
            return self.container(value, kind, fills, depth)
        if (
            kind is tuple
            or kind is frozenset
            or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
        ):
            items = [self.rebound(item, fills, depth) for item in value]
            if self.same(items, value):
                return value
            return kind(*items) if hasattr(kind, "_fields") else kind(items)
        if kind is types.MethodType:
            return self.method(value, depth)
        if kind is functools.partial:
            function = self.rebound(value.func, depth=depth)
            args, kwargs = (
                self.rebound(value.args, depth=depth),
                self.rebound(value.keywords, depth=depth),
            )
            same = self.same((function, args, kwargs), (value.func, value.args, value.keywords))
            return value if same else functools.partial(function, *args, **kwargs)
        if kind is types.FunctionType:
            return self.function(value, depth)
        return self.beyond(value, kind, fills, depth)

    def beyond(self, value: Any, kind: type, fills: bool, depth: int) -> Any:
        """The same, for kinds of objects that a trace does not follow (see `Search`)."""
        if self.done is None:
            return value
        if kind is weakref.ref:
            target = value()
            replacement = self.rebound(target, depth=depth)
            return value if replacement is target else weakref.ref(replacement)
        if kind in (weakref.ProxyType, weakref.CallableProxyType):
            return self.proxy(value)
        return self.helper(value, kind, fills, depth)

    def container(self, value: Any, kind: type, fills: bool, depth: int) -> Any:
        """A list, dict, set or deque."""
        if kind is dict or kind is OrderedDict or kind is defaultdict:
            entries = {
                self.rebound(key, depth=depth): self.rebound(item, fills, depth)
                for key, item in value.items()
            }
            if not fills and self.same((*entries, *entries.values()), (*value, *value.values())):
                return value
            if kind is defaultdict:
                return defaultdict(value.default_factory, entries)
            return OrderedDict(entries) if kind is OrderedDict else entries
        items = [self.rebound(item, fills, depth) for item in value]
        if not fills and self.same(items, value):
            return value
        return deque(items, value.maxlen) if kind is deque else kind(items)

    def method(self, value: Any, depth: int) -> Any:
        """A bound method, bound to the replacement of its owner."""
        owner = self.rebound(value.__self__, depth=depth)
        if owner is value.__self__:
            return value
        function: Any = value.__func__  # a function, or another callable
        name = getattr(function, "__name__", "")
        if getattr(type(value.__self__), name, None) is function:
            # The replacement may have a method of its own: AdaptedLayer's forward.
            function = getattr(type(owner), name, function)
        else:  # set on the object, as TRL does
            function = self.rebound(function, depth=depth)
        if self.done is None and dynamo.TORCH_2_13:  # a trace knows this way, and not the other
            return function.__get__(owner)
        return types.MethodType(function, owner)

    def function(self, function: Any, depth: int) -> Any:
        """A function that closes over modules: `old = m.forward; m.forward = lambda x: old(x)`."""
        compiled = dynamo.uncompiled(function)
        if compiled is not None:
            original = self.rebound(compiled, depth=depth)
            return function if original is compiled else original
        # Functions may close over each other, and a trace does not know what was met before.
        traced = self.done is None
        if traced and (not function.__closure__ or depth >= NESTED):
            return function
        closure = function.__closure__ or ()
        cells = tuple(self.cell(cell, depth + traced) for cell in closure)
        defaults = self.defaults(function, depth)
        if all(cell is old for cell, old in zip(cells, closure)) and defaults is None:
            return function
        code, scope = function.__code__, function.__globals__
        given, named = defaults or (function.__defaults__, function.__kwdefaults__)
        twin = types.FunctionType(code, scope, function.__name__, given, cells)
        twin.__kwdefaults__ = named
        twin.__dict__.update(function.__dict__)
        return twin

    def defaults(self, function: Any, depth: int) -> tuple[Any, Any] | None:
        """The defaults of a function, if one refers to a module. A trace does not look."""
        given, named = function.__defaults__, function.__kwdefaults__
        if self.done is None or not (given or named):
            return None
        replaced = self.rebound(given, depth=depth), self.rebound(named, depth=depth)
        return None if self.same(replaced, (given, named)) else replaced

    def same(self, items: Iterable[Any], old: Iterable[Any]) -> bool:
        """Whether nothing was replaced. A trace cannot compare tuples so, and makes new ones."""
        return self.done is not None and all(item is other for item, other in zip(items, old))

    def cell(self, cell: Any, depth: int) -> Any:
        """A cell of a closure."""
        try:
            value = cell.cell_contents
        except ValueError:  # still empty
            return cell
        replacement = self.rebound(value, depth=depth)
        return cell if replacement is value else types.CellType(replacement)

    def proxy(self, value: Any) -> Any:
        """A weak proxy of a module."""
        try:
            target = object.__getattribute__(value.modules, "__self__")
        except (AttributeError, ReferenceError):  # of something else, or of nothing any more
            return value
        replacement = self.rebound(target)
        return value if replacement is target else weakref.proxy(replacement)

    def helper(self, value: Any, kind: type, fills: bool, depth: int) -> Any:
        """An object with attributes: a dataclass, a namespace, a part of the model's own code.

        If its class is a subclass of dict or list, also its entries.
        """
        foreign = kind.__module__.partition(".")[0] in ("builtins", "torch", "enum", "logging")
        if foreign or issubclass(kind, (type, types.ModuleType)) or depth >= NESTED:
            return value
        attributes = attributes_of(value, kind)
        changed = {}
        wrapper = callable(value)  # around a forward, as accelerate's: each trainer adds some
        for name, item in attributes.items():
            replacement = self.rebound(item, depth=depth + (not wrapper))
            if replacement is not item:
                changed[name] = replacement
        bases = (OrderedDict, dict, list)
        plain: Any = next((base for base in bases if issubclass(kind, base)), None)
        entries = None if plain is None else plain(value)
        filled = self.container(entries, plain, fills, depth) if plain else None
        if not changed and filled is entries:
            return value
        try:
            twin = copy.copy(value)
        except PicklingError:  # accelerate's wrapper refuses both
            twin = object.__new__(kind)
        if type(getattr(twin, "__dict__", None)) is dict:
            twin.__dict__.update({**attributes, **changed})
        else:
            for name, item in changed.items():
                object.__setattr__(twin, name, item)  # as frozen dataclasses need it
        if plain is not None:
            plain.clear(twin)
            fill: Any = list.extend if plain is list else plain.update
            fill(twin, filled)
        return twin


def attributes_of(value: Any, kind: type) -> dict[str, Any]:
    """The attributes that an object holds itself, in a dict or in slots."""
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict:
        return attributes
    slots = [base.__dict__.get("__slots__", ()) for base in kind.__mro__]
    names = [name for own in slots for name in ((own,) if isinstance(own, str) else own)]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


class Search(Rebinding):
    """Finds, outside of any trace, which modules an attribute refers to.

    `followed` are the ids of those to which a trace of a view can follow it too, `lost` of those
    behind an object that only a view outside of a trace copies.
    """

    def __init__(self, model: nn.Module):
        super().__init__({id(module): Found() for module in model.modules()})
        self.begin()

    def begin(self) -> None:
        """Before each attribute."""
        self.done, self.within = {}, 0
        self.followed: set[int] = set()
        self.lost: set[int] = set()

    def rebound(self, value: Any, fills: bool = False, depth: int = 0) -> Any:
        if issubclass(type(value), nn.Module) and id(value) in self.new:
            (self.lost if self.within else self.followed).add(id(value))
        return super().rebound(value, fills, depth)

    def beyond(self, value: Any, kind: type, fills: bool, depth: int) -> Any:
        self.within += 1
        result = super().beyond(value, kind, fills, depth)
        self.within -= 1
        return result

    def defaults(self, function: Any, depth: int) -> tuple[Any, Any] | None:
        self.within += 1
        result = super().defaults(function, depth)
        self.within -= 1
        return result


class Found:
    """Takes the place of a module in a search."""


def check_globals(forward: Any, rebinding: Rebinding, module: nn.Module) -> None:
    """Raises LoraFuncError if a `forward` set on a module reaches an original by a global name.

    This happens in notebooks. No call can replace a global for itself alone.
    """
    function = getattr(forward, "__func__", forward)
    if type(function) is not types.FunctionType:
        return
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if value is not None and rebinding.rebound(value) is not value:
            raise LoraFuncError(
                f"the forward that was set on a {type(module).__name__} reaches the model by the "
                f"global name {name!r}, so adapters would be inert. Set it as "
                "types.MethodType(forward, module), and have it call type(module).forward(self, ..)"
            )
