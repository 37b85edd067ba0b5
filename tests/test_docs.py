"""Every code block of README and docs runs, and every generated table is what its generator writes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from models import text_batch, tiny_llama

import lora_func as lf

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)


class Tokenizer:
    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return text_batch()


@pytest.mark.filterwarnings(
    "ignore:.*deprecated and will be removed in v6:FutureWarning"
)  # the older name of a switch
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name
)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """In order, in one namespace, with a small model in the place of the one that they name."""
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name: tiny_llama()
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())
    batch = text_batch()
    module = types.ModuleType(
        "page"
    )  # a real one: dataclasses and dynamo look their globals up in sys.modules
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module).update(torch=torch, lf=lf, model=tiny_llama(), batch=batch, batches=[batch, batch])
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), vars(module))


def tables_module():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "bench" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_tables_are_current(page):
    """`python bench/tables.py` writes them."""
    text = page.read_text(encoding="utf-8")
    assert tables_module().filled(text) == text


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem
)
def test_results_name_a_commit_of_this_history(path):
    """A machine without the history is told the commit by hand, and a hand can err."""
    commit = json.loads(path.read_text(encoding="utf-8"))["where"]["commit"].removesuffix("-dirty")
    shallow = subprocess.run(
        ["git", "rev-parse", "--is-shallow-repository"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if shallow.stdout.strip() != "false":
        pytest.skip("needs the whole git history, which this checkout does not have")
    assert (
        subprocess.run(
            ["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, check=False
        ).returncode
        == 0
    )


def test_the_version_is_in_the_changelog():
    assert f"## {lf.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
