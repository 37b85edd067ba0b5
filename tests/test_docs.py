"""Every code block of README and docs runs, and every generated table is up to date."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tables
import torch
import transformers
from architectures import ARCHITECTURES
from models import text_batch, tiny_llama

import lora_func as lf

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)


class Tokenizer:
    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return text_batch()


# The older name of a switch, which the pages use, warns so.
@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize(
    "page",
    # These need more packages: tests/trainers and tests/functional run them.
    [p for p in PAGES if blocks(p) and p.name not in ("trainers.md", "functional.md")],
    ids=lambda page: page.name,
)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """They run in order, in one namespace, with a small model in place of the named one."""
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    loaders = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    for loader, make in zip(loaders, (tiny_llama, Tokenizer)):
        monkeypatch.setattr(loader, "from_pretrained", lambda name, make=make: make())
    batch = text_batch()
    # Dataclasses and dynamo look globals up in sys.modules, so the page is a module there.
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module).update(torch=torch, lf=lf, model=tiny_llama(), batch=batch, batches=[batch, batch])
    classifier = transformers.LlamaForSequenceClassification(tiny_llama().config)
    vars(module).update(mixtral=ARCHITECTURES["mixtral"][0](), classifier=classifier)
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), vars(module))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_tables_are_current(page):
    """`python bench/tables.py` writes them."""
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem
)
def test_results_name_a_commit_of_this_history(path):
    """A machine without the history is given the commit by hand, and a hand can err."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    commit = json.loads(path.read_text(encoding="utf-8"))["where"]["commit"].removesuffix("-dirty")
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("needs the whole git history, which this checkout does not have")
    assert git("cat-file", "-e", f"{commit}^{{commit}}").returncode == 0


def test_the_version_is_in_the_changelog():
    assert f"## {lf.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
