"""What a view needs to know of a model's own code, found beforehand and outside of any trace.

A call shares torch's own layers with the model, a trace shares all that need not differ, and a
trace cannot look into every object. So they are told which modules hold references or may be
written to, and which references a trace would lose.
"""

from __future__ import annotations

import dis
import inspect
import re
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ..errors import LoraFuncError
from .rebind import CONTAINERS, PLAIN, Search
from .view import MODULE_STATE

SETS = frozenset({"setattr", "delattr", "__setattr__", "__dict__", "add_module"})
SETS |= {"register_buffer", "register_parameter", "register_module"}
FILLS = frozenset({"append", "appendleft", "extend", "insert", "add", "update", "setdefault"})
FILLS |= {"pop", "popleft", "popitem", "remove", "discard", "clear"}
FOREIGN = ("torch.", "transformers.modeling_utils", "transformers.generation")
FOREIGN += ("transformers.integrations",)


class Lost(NamedTuple):
    """An attribute behind which a trace loses references."""

    path: str  # of its module
    kind: str  # the module's class
    name: str
    holder: str  # the attribute's class
    modules: frozenset[int]  # ids of what it refers to


class Survey(NamedTuple):
    """What is known of a model."""

    apart: dict[int, bool]  # ids of modules that every view copies, whatever is below them
    lost: tuple[Lost, ...]

    def check(self, replaced: dict[int, bool]) -> None:
        """Raises LoraFuncError if a trace that replaces these modules loses a reference to one."""
        for lost in self.lost:
            if any(key in replaced for key in lost.modules):
                raise LoraFuncError(
                    f"{lost.kind} {lost.path!r} refers to modules by {lost.name!r}, a "
                    f"{lost.holder}, which torch.compile cannot follow: adapters behind it would "
                    "be inert. Compile the bound module instead, lf.bind(adapted_forward, model, "
                    "params), or keep the modules in a list or dict"
                )


def survey(model: nn.Module) -> Survey:
    """Looks through a model as it is now."""
    search, apart, lost = Search(model), {}, []
    known: dict[type, Writes] = {}
    for path, module in model.named_modules():
        kind = type(module)
        if kind not in known:
            known[kind] = writes(kind)
        holds = bool(module._buffers)
        for name, value in vars(module).items():
            if name in MODULE_STATE or type(value) in PLAIN:
                continue
            holds = holds or type(value) in CONTAINERS
            search.begin()
            search.rebound(value)
            if search.followed or search.lost:
                apart[id(module)] = True
            if search.lost:
                facts = path, kind.__name__, name, type(value).__name__
                lost.append(Lost(*facts, frozenset(search.lost)))
        if known[kind].sets or (known[kind].fills and holds):
            apart[id(module)] = True
        if known[kind].sets_others:
            parts = [part for part in module.modules() if not wrapped(type(part))]
            apart.update({id(part): True for part in parts})
    return Survey(apart, tuple(lost))


class Writes(NamedTuple):
    """What the forward of a class may write to, as far as its code tells."""

    sets: bool  # attributes of its module
    sets_others: bool  # attributes or hooks of another object, such as a part of its module
    fills: bool  # containers, or tensors in place


def writes(kind: type) -> Writes:
    """Looks through the methods that a forward may run, found by name, but for those of libraries.

    It errs on the safe side: a method of the same name may be another object's.
    """
    methods: dict[str, list[types.FunctionType]] = {}
    for base in kind.__mro__:
        if base is not object and not base.__module__.startswith(FOREIGN):
            for name, value in vars(base).items():
                function = plain_function(value)
                if function is not None:
                    methods.setdefault(name, []).append(function)
    sets = sets_others = fills = False
    pending, seen = ["forward", "__call__"], set()
    while pending:
        name = pending.pop()
        for function in methods.get(name, ()) if name not in seen else ():
            own = function.__code__.co_varnames[:1]  # self
            for code in codes(function.__code__):
                pending += [other for other in code.co_names if other in methods]
                owners = list(owners_of_set_attributes(code))
                by_name = not SETS.isdisjoint(code.co_names)
                hooks = any(re.match("register_.*hook$", other) for other in code.co_names)
                sets = sets or by_name or any(owner in own for owner in owners)
                others = any(owner not in own for owner in owners)
                sets_others = sets_others or by_name or hooks or others
                fills = fills or fills_or_writes(code)
        seen.add(name)
    return Writes(sets, sets_others, fills)


def wrapped(kind: type) -> bool:
    """Whether a decorator made the forward of a class: a trace cannot run it on a copy."""
    return bool(getattr(kind.forward, "__closure__", None))  # pyright: ignore  (a module's class)


def owners_of_set_attributes(code: types.CodeType) -> Iterator[str | None]:
    """The variable before each attribute that code sets or deletes: "self" in `self.x = 1`."""
    before = None
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_ATTR", "DELETE_ATTR"):
            yield before
        if step.opname not in ("CACHE", "EXTENDED_ARG"):
            variable = "FAST" in step.opname or "DEREF" in step.opname
            before = step.argval if variable else None
            if isinstance(before, tuple):  # from Python 3.13 on, an instruction may load two
                before = before[-1]


def fills_or_writes(code: types.CodeType) -> bool:
    """Whether code sets entries, or calls a method like `append` or like `add_`."""
    steps = {step.opname for step in dis.get_instructions(code)}
    named = any(name in FILLS or re.match("[^_].*[^_]_$", name) for name in code.co_names)
    return named or not steps.isdisjoint({"STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"})


def plain_function(value: Any) -> types.FunctionType | None:
    """The function behind an attribute of a class, or None."""
    value = getattr(value, "fget", value)  # of a property
    value = getattr(value, "__func__", value)  # of a class method
    value = inspect.unwrap(value) if callable(value) else value
    return value if type(value) is types.FunctionType else None


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object, and those of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)
