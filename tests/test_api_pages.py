"""The reference shows every public name and field, and says something of each."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import pkgutil
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tables

import lora_func as lf
from lora_func import checks, linalg, statistics, testing
from lora_func.interop import gguf, peft, sglang, vllm

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
PUBLIC = (lf, testing, linalg, checks, statistics)
SPEAKING = {"model", "variant", "weight", "generator"}  # names that are the same everywhere


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def public() -> dict[str, Any]:
    """Path -> every public class and function."""
    found = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in PUBLIC
        for name in module.__all__
    }
    served = (peft.load, peft.save, vllm.check, sglang.check, gguf.save)
    found |= {f"{function.__module__}.{function.__name__}": function for function in served}
    return {path: item for path, item in found.items() if callable(item)}


def fields(kind: type) -> list[str]:
    """The fields of a dataclass or a NamedTuple, or what is annotated on another class."""
    if dataclasses.is_dataclass(kind):
        return [item.name for item in dataclasses.fields(kind)]
    return [name for name in inspect.get_annotations(kind) if not name.startswith("_")]


def described(kind: type) -> set[str]:
    """Names in the body of a class, or of its bases, with a docstring below them."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith("lora_func"):
            (tree,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body
            assert isinstance(tree, ast.ClassDef)
            for item, below in zip(tree.body, tree.body[1:]):
                if isinstance(item, ast.AnnAssign) and isinstance(below, ast.Expr):
                    found.add(ast.unparse(item.target))
    return found


def entries() -> Iterator[tuple[str, list[str]]]:
    """Each `::: path` of the reference, and the members that it names."""
    pattern = r"^::: (\S+)(?:\n +options:(?:\n +\w+: \w+)*?\n +members: \[(.*?)\])?"
    for page in PAGES:
        for path, members in re.findall(pattern, text_of(page), flags=re.M):
            yield path, members.split(", ") if members else []


def test_every_public_name_is_on_a_page():
    shown = set()
    for path, members in entries():
        owner = pkgutil.resolve_name(path)
        shown.add(id(owner))
        if isinstance(owner, types.ModuleType):
            shown |= {id(getattr(owner, name)) for name in members}
    for module in PUBLIC:
        missing = [name for name in module.__all__ if id(getattr(module, name)) not in shown]
        assert missing == (["__version__"] if module is lf else [])


def test_every_member_that_a_page_names_is_there():
    for path, members in entries():
        owner = pkgutil.resolve_name(path)
        own = {*dir(owner), *getattr(owner, "__annotations__", {})}
        assert [name for name in members if name not in own] == [], path


def test_every_page_is_in_the_navigation():
    nav = text_of(ROOT / "mkdocs.yml")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    pages = [page for page in pages if not page.startswith("examples/")]  # a hook adds these
    assert [page for page in pages if f"- {page}\n" not in nav] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_variants_are_those_of_the_catalogue(page):
    """`python bench/tables.py` writes them."""
    assert tables.filled(text_of(page)) == text_of(page)


@pytest.mark.parametrize("path", public())
def test_a_public_name_has_a_docstring(path):
    item = public()[path]
    assert item.__doc__
    assert not item.__doc__.startswith(f"{item.__name__}("), "that is the dataclass's own"


@pytest.mark.parametrize("path", [path for path, item in public().items() if inspect.isclass(item)])
def test_a_public_class_describes_its_fields_and_methods(path):
    kind = public()[path]
    assert [name for name in fields(kind) if name not in described(kind)] == []
    for name, member in vars(kind).items():
        method = member.fget if isinstance(member, property) else member
        method = getattr(method, "__func__", method)
        if inspect.isfunction(method) and not name.startswith("_") and name not in fields(kind):
            assert inspect.getdoc(getattr(kind, name)), name


@pytest.mark.parametrize(
    "path", [path for path, item in public().items() if inspect.isfunction(item)]
)
def test_a_public_function_names_its_parameters(path):
    """But those that are called the same everywhere, as `weight`."""
    function = public()[path]
    given = inspect.signature(function).parameters.values()
    names = [p.name for p in given if p.kind is not p.VAR_KEYWORD and p.name not in SPEAKING]
    doc = function.__doc__
    assert [name for name in names if not re.search(rf"(?<![a-z_]){name}(?![a-z_])", doc)] == []


# The pages on errors.

STRING = (ast.Constant, ast.JoinedStr, ast.BinOp)
TROUBLES = text_of(ROOT / "docs" / "troubleshooting.md").partition("## Messages")[2]
PHRASES = [
    phrase
    for row in re.findall(r"^\| (`.*?`) +\| ", TROUBLES, flags=re.M)
    for phrase in re.findall(r"`(.+?)`(?=,|$| ,)", row)
]


def literal(node: ast.AST) -> str:
    """The text of a string, with a gap for each value in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return "…"


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """The modules of the library, without its command lines and its laws."""
    for path in sorted((ROOT / "lora_func").rglob("*.py")):
        if not (path.parent / "__main__.py").exists() and "testing" not in path.parts:
            yield path, ast.parse(text_of(path))


@functools.cache
def strings() -> str:
    """All strings of the library."""
    nodes = (node for _, tree in sources() for node in ast.walk(tree))
    return "\n".join(literal(node) for node in nodes if isinstance(node, STRING))


@functools.cache
def messages() -> dict[str, str]:
    """Place -> the text of an error that is raised there."""
    found = {}
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "LoraFuncError":
                text = literal(node.args[0])
                if len(text.replace("…", " ").split()) > 2:  # the rest says a function
                    found[f"{path.relative_to(ROOT)}:{node.lineno}"] = text
    return found


@pytest.mark.parametrize("place", messages())
def test_an_error_is_on_the_page_of_troubles(place):
    text = messages()[place]
    assert any(phrase in text for phrase in PHRASES), text


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_phrase_of_the_page_is_that_of_an_error(phrase):
    assert phrase in strings()
