"""The private names of other packages that the library relies on, each looked up.

A release that renames one fails here, by name, before it makes an adapter silently inert.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from typing import Any

import pytest

from lora_func import libraries

MODULES = [
    importlib.import_module(f"{libraries.__name__}.{info.name}")
    for info in pkgutil.iter_modules(libraries.__path__)
]


def names_of(*modules) -> list:
    """(package, name) for each entry of `RELIES_ON`."""
    return [
        pytest.param(package, name, id=f"{package} {name}")
        for module in modules
        for package, names in module.RELIES_ON.items()
        for name in names
    ]


def missing(package: str, name: str) -> str | None:
    """The part of an entry of `RELIES_ON` that does not exist, or None.

    An entry is a dotted name; a class or function with parameters or attributes set in its
    `__init__`, `Hook.__init__(offload)`; or text of the package's source, `source:_name`.
    """
    module: Any = importlib.import_module(package)
    if name.startswith("source:"):
        text = name.removeprefix("source:")
        return None if text in inspect.getsource(module) else text
    dotted, _, arguments = name.partition("(")
    value = module
    for part in dotted.split("."):
        if not hasattr(value, part):
            return f"{package}.{dotted}"
        value = getattr(value, part)
    wanted = [argument.strip() for argument in arguments.rstrip(")").split(",") if argument]
    if not wanted:
        return None
    known = set(inspect.signature(value).parameters)
    known |= set(re.findall(r"(?:self|super\(\)\.__setattr__\()\W*(\w+)", inspect.getsource(value)))
    absent = [argument for argument in wanted if argument not in known]
    return f"{', '.join(absent)} of {dotted}" if absent else None


@pytest.mark.parametrize(("package", "name"), names_of(*MODULES))
def test_it_is_still_there(package, name):
    assert missing(package, name) is None


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("accelerate.hooks", "AlignDevicesHook.__init__(offloaded)"),
        ("accelerate.hooks", "AlignDevicesHooks"),
        ("torch.nn.modules.transformer", "source:activation_relu_or_silu"),
    ],
)
def test_a_name_that_is_gone_is_found(package, name):
    assert missing(package, name) is not None


def test_every_library_lists_its_names():
    assert all(module.RELIES_ON for module in MODULES)
