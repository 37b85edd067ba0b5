"""What a trace of a view needs to know of a model's own code, found outside of any trace.

A view copies every module. A trace of it copies only what must differ, and it cannot look into
every object. So it is told beforehand which modules hold references or may write to themselves,
and which references it would lose.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ..errors import LoraFuncError
from .rebind import CONTAINERS, PLAIN, Search
from .view import MODULE_STATE

SETS = frozenset({"setattr", "delattr", "__setattr__", "__dict__", "add_module"})
SETS |= {"register_buffer", "register_parameter", "register_module"}
FILLS = frozenset({"append", "appendleft", "extend", "insert", "add", "update", "setdefault"})
FILLS |= {"pop", "popleft", "popitem", "remove", "discard", "clear"}
ATTRIBUTE = bytes(dis.opmap[name] for name in ("STORE_ATTR", "DELETE_ATTR"))
ENTRY = bytes(dis.opmap[name] for name in ("STORE_SUBSCR", "DELETE_SUBSCR"))
FOREIGN = ("torch.", "transformers.modeling_utils", "transformers.generation")


class Lost(NamedTuple):
    """An attribute behind which a trace loses references."""

    path: str  # of its module
    kind: str  # the module's class
    name: str
    holder: str  # the attribute's class
    modules: frozenset[int]  # ids of what it refers to


class Survey(NamedTuple):
    """What is known of a model."""

    apart: dict[int, bool]  # ids of modules that a trace copies, whatever is below them
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
    writes: dict[type, tuple[bool, bool]] = {}
    for path, module in model.named_modules():
        kind = type(module)
        if kind not in writes:
            writes[kind] = sets_and_fills(kind)
        sets, fills = writes[kind]
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
        if sets or (fills and holds):
            apart[id(module)] = True
    return Survey(apart, tuple(lost))


def sets_and_fills(kind: type) -> tuple[bool, bool]:
    """Whether methods that the author of a class wrote may set attributes, and fill containers.

    To fill is also to write to a tensor in place. `__init__` does not count.
    """
    sets = fills = False
    for base in kind.__mro__:
        if base is object or base.__module__.startswith(FOREIGN):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            if type(function) is types.FunctionType and not name.startswith("__"):
                for code in codes(function.__code__):
                    steps = set(code.co_code[::2])  # an instruction is two bytes: what, and to what
                    names = code.co_names
                    in_place = any(name.endswith("_") and name[0] != "_" for name in names)
                    sets = sets or not steps.isdisjoint(ATTRIBUTE) or not SETS.isdisjoint(names)
                    fills = fills or in_place or not steps.isdisjoint(ENTRY)
                    fills = fills or not FILLS.isdisjoint(names)
    return sets, fills


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object, and those of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)
