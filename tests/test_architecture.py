"""The rooms of the library: which may import which."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import lora_func

ROOT = Path(lora_func.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py"))

# A room may import itself and the rooms listed for it. Everything may import `errors`.
ROOMS = {
    "errors": set(),
    "version": set(),
    "precision": {"libraries"},
    "card": set(),
    "variant": {"card", "precision"},
    "chain": {"card", "variant"},
    "checks": {"variant"},
    "linalg": {"precision"},
    "kernels": {"libraries"},
    "fused": {"kernels", "libraries", "linalg"},
    "statistics": {"linalg", "precision", "variant"},
    "variants": {
        "variant",
        "card",
        "checks",
        "fused",
        "kernels",
        "libraries",
        "linalg",
        "statistics",
    },
    "libraries": set(),
    "weights": {"variant", "libraries"},
    "engine": {"variant", "precision", "weights", "libraries"},
    "files": {"chain", "engine", "libraries", "variant", "variants", "version", "weights"},
    "population": set(),
    "changes": {"engine", "libraries", "merging", "precision", "variant", "variants", "weights"},
    "arithmetic": {"changes", "engine", "linalg", "variant", "variants"},
    "allocation": {"engine"},
    "grad": {"libraries"},
    "capturing": set(),
    "binding": {"engine", "files", "libraries", "precision", "variant"},
    "merging": {"engine", "libraries", "precision", "variant"},
    "probing": {"engine", "weights"},
    "reaching": {"engine", "libraries", "weights"},
    "testing": {"engine", "files", "variant"},
    "interop": {
        "arithmetic",
        "engine",
        "files",
        "libraries",
        "linalg",
        "precision",
        "variant",
        "variants",
        "weights",
    },
    "calculator": {"engine", "libraries", "lora_func", "probing"},
    "demo": {"lora_func", "probing"},
}


def room_of(path: Path) -> str:
    """ "engine" for lora_func/engine/view.py, "grad" for lora_func/grad.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "lora_func" if parts == ("__init__",) else parts[0]


def imports_of(path: Path, source: str | None = None) -> set[str]:
    """The rooms that a module imports, anywhere in it."""
    package = ("lora_func", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(source or path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            whole = (*start, *(node.module or "").split(".")) if node.module else start
            # `from .. import x` may import the room x.
            bare = len(whole) == 1 and whole[0] == "lora_func"
            names = [(*whole, alias.name) for alias in node.names] if bare else [tuple(whole)]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        for name in names:
            if name[0] == "lora_func":
                found.add(name[1] if len(name) > 1 and name[1] in ROOMS else "lora_func")
    return found


def wrong(path: Path, source: str | None = None) -> set[str]:
    """The rooms that a module imports and may not."""
    room = room_of(path)
    if room == "lora_func":  # the front door, which imports every public room
        return set()
    return imports_of(path, source) - ROOMS[room] - {room, "errors"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    """Imports point one way: no variant knows the engine, the engine names no variant."""
    assert room_of(path) in {*ROOMS, "lora_func"}, "a new room: give it a line in ROOMS"
    assert wrong(path) == set()


@pytest.mark.parametrize(
    ("path", "line", "room"),
    [
        ("variants/lora.py", "from ..engine.collect import collect", "engine"),
        ("engine/view.py", "from ..variants.lora import LoRA", "variants"),
        ("weights/table.py", "from lora_func.engine import view", "engine"),
        ("linalg.py", "import lora_func.variant", "variant"),
        ("variant.py", "from . import linalg", "linalg"),
        ("libraries/fsdp.py", "from ..weights import table", "weights"),
    ],
)
def test_a_wrong_arrow_is_found(path, line, room):
    assert wrong(ROOT / path, line) == {room}


def test_no_arrow_goes_round():
    """The rooms can be put in an order in which each imports only earlier ones."""
    done: set[str] = set()
    while left := ROOMS.keys() - done:
        ready = {room for room in left if ROOMS[room] - {"lora_func"} <= done}
        assert ready, f"a cycle among {sorted(left)}"
        done |= ready


def private_names(path: Path) -> set[str]:
    """Names with a leading underscore of others: what a module imports, and attributes it reads."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.name for alias in node.names if alias.name.startswith("_")}
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner not in ("self", "cls") and not node.attr.startswith("__"):
                found.add(node.attr)
    return found


OURS = {"_site", "_weight", "_kept", "_expects_grad", "_path", "_sums", "_traceable", "_sites"}
OURS |= {"_ran", "_read", "_reach", "_drift", "_repeats"}
# nn.Module's own tables, which a structural copy is made of, and what pytrees and namedtuples have.
MODULE = {"_modules", "_parameters", "_buffers", "_forward_pre_hooks", "_apply", "_is_param"}
ALLOWED = OURS | MODULE | {"_replace", "_version", "_pytree"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_foreign_names_have_their_rooms(path):
    """Only `libraries` and `weights/bitsandbytes.py` name private attributes of other packages."""
    if room_of(path) == "libraries" or path.name == "bitsandbytes.py":
        return
    assert private_names(path) - ALLOWED == set()


PUBLIC = ["lora_func", "lora_func.interop.peft"]
PUBLIC += [f"lora_func.{name}" for name in ("linalg", "checks", "statistics", "testing")]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_boundary(name):
    """Each public module says what is public; each of these names exists and is explained."""
    module = sys.modules.get(name) or __import__(name, fromlist=["*"])
    assert len(module.__all__) == len(set(module.__all__))
    for public in module.__all__:
        value = getattr(module, public)
        if callable(value):
            assert (value.__doc__ or "").strip(), f"{name}.{public} has no docstring"


def test_no_function_hides_a_module():
    """`import lora_func.merging` is a module, and `lora_func.merge` a function: no name is both."""
    stems = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir()}
    assert not stems & set(lora_func.__all__)


def test_every_module_function_and_class_is_explained():
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_modules_are_short():
    """A reader holds one idea a module in mind. The contract and the laws are the longest."""
    for path in MODULES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 460, path


@pytest.mark.parametrize(
    "path", sorted((ROOT / "variants").glob("[a-z]*.py")), ids=lambda p: p.stem
)
def test_a_variant_reads_like_its_formula(path):
    """Thirty to eighty lines of code and fields, beside what the docstrings of the file and of its
    fields explain."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    kinds = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    explained = [tree.body[0], *(item for kind in kinds for item in kind.body[1:])]
    explained = [item for item in explained if isinstance(item, ast.Expr)]
    lines = sum((item.end_lineno or 0) - item.lineno + 1 for item in explained)
    assert len(text.splitlines()) - lines <= 105
