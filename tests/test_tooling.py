"""The files that name versions and commands agree with each other."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import lora_func as lf

ROOT = Path(__file__).parents[1]
# of the standard library from Python 3.11 on; pytest brings the other one before
tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins() -> dict[str, str]:
    """Package -> the version of constraints.txt."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", read("constraints.txt"), flags=re.M))


def ranges() -> list[Requirement]:
    """All that pyproject.toml asks for."""
    lists = [
        PYPROJECT["project"]["dependencies"],
        *PYPROJECT["project"]["optional-dependencies"].values(),
        *PYPROJECT["dependency-groups"].values(),
    ]
    return [Requirement(entry) for entries in lists for entry in entries if isinstance(entry, str)]


PINNED = [wanted for wanted in ranges() if wanted.name in pins()]


@pytest.mark.parametrize("wanted", PINNED, ids=str)
def test_pins_lie_within_the_ranges(wanted):
    assert wanted.specifier.contains(pins()[wanted.name])


def test_every_bound_is_pinned():
    """Otherwise the tests run with a version that no file names."""
    assert {wanted.name for wanted in ranges() if wanted.specifier} <= pins().keys()


def test_pre_commit_runs_the_same_ruff():
    asked = re.findall(r"ruff==([\d.]+)", read(".pre-commit-config.yaml"))
    assert set(asked) == {pins()["ruff"]}


def sessions() -> set[str]:
    """The functions of the noxfile that are sessions."""
    functions = [node for node in ast.parse(read("noxfile.py")).body if hasattr(node, "name")]
    return {
        node.name  # pyright: ignore
        for node in functions
        if any("nox.session" in ast.unparse(mark) for mark in node.decorator_list)  # pyright: ignore
    }


def test_the_workflow_runs_the_sessions_that_there_are():
    matrix = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["nox"]["strategy"]["matrix"]
    named = {*matrix["session"], *(entry["session"] for entry in matrix["include"])}
    assert named == sessions() - {"demo", "examples"}  # what these write, others test


def test_ci_runs_sessions_that_there_are():
    (named,) = re.findall(r"nox -s (.*)", read(".ci/run"))
    assert {*named.split()} <= sessions()


def test_the_files_name_one_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {citation["version"], metadata.version("lora_func")} == {lf.__version__}
    assert f"version = {{{lf.__version__}}}" in read("docs/citation.md")


@pytest.mark.parametrize("command", ["demo", "calculator"])
def test_a_missing_extra_is_one_line(command):
    code = (
        "import runpy, sys; sys.modules['tyro'] = None; "
        f"runpy.run_module('lora_func.{command}', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines() == [
        "tyro not found. This command needs the extra 'demo': "
        'pip install "lora_func[demo]", or ".[demo]" in a clone'
    ]
