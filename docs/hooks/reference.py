"""A griffe extension: what a class's reference shows beside its own docstring.

The fields of a dataclass, inherited ones too, become a table with type, default and the docstring
below the field. A variant also shows what its file says: the formula, and where paper, authors'
code and PEFT differ.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe

VARIANTS = "lora_func.variants."


class Reference(griffe.Extension):
    """Completes the docstrings of classes, once the whole package is known."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for kind in classes(pkg):
            if kind.docstring:
                parts = [kind.docstring.value, explained(kind), fields(kind)]
                kind.docstring.value = "\n\n".join(part for part in parts if part)


def classes(module: griffe.Module) -> Iterator[griffe.Class]:
    """All classes of a package."""
    for member in module.members.values():
        if isinstance(member, griffe.Module):
            yield from classes(member)
        elif isinstance(member, griffe.Class):
            yield member


def explained(kind: griffe.Class) -> str:
    """What the file of a variant says, without its first paragraph, which the class repeats."""
    if not kind.path.startswith(VARIANTS) or "_" in kind.module.name or not kind.module.docstring:
        return ""
    return kind.module.docstring.value.partition("\n\n")[2] if "card" in kind.members else ""


def fields(kind: griffe.Class) -> str:
    """A section of the docstring with all fields, the inherited ones first."""
    found: dict[str, str] = {}
    lineage = [kind, *kind.mro()]
    known = [base for base in reversed(lineage) if "dataclass" in base.labels or is_tuple(base)]
    for base in known:
        for member in base.members.values():
            if is_field(member) and member.docstring:
                found[member.name] = inspect.cleandoc(member.docstring.value)
    if not found:
        return ""
    entries = [f"{name}: {textwrap.indent(text, '    ').strip()}" for name, text in found.items()]
    title = "Attributes" if is_tuple(kind) else "Args"
    return f"{title}:\n" + textwrap.indent("\n".join(entries), "    ")


def is_field(member: griffe.Object | griffe.Alias) -> bool:
    """Whether a member of a dataclass is one of its fields."""
    return isinstance(member, griffe.Attribute) and "instance-attribute" in member.labels


def is_tuple(kind: griffe.Class) -> bool:
    """Whether a class is a NamedTuple."""
    return any(str(base) == "NamedTuple" for base in kind.bases)
