"""Every code block of README and docs runs, and every generated table is up to date."""

from __future__ import annotations

import json
import subprocess

import pytest
import tables
from pages import ELSEWHERE, FENCED, PAGES, ROOT, python, run

import lora_func as lf

WIDTH = 80


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if python(page) and page.name not in ELSEWHERE],
    ids=lambda page: page.name,
)
def test_a_page_runs_as_pasted(page, tmp_path, hub):
    """From top to bottom, in one fresh process."""
    run(page, tmp_path, hub)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_is_passed_over(page):
    """Blocks of another spelling, or indented in a list, would not run."""
    assert page.read_text(encoding="utf-8").count("```py") == len(python(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_narrow(page):
    """Wider lines are cut off on a phone and beside a table of contents."""
    code = "".join(found[2] for found in FENCED.finditer(page.read_text(encoding="utf-8")))
    assert [line for line in code.splitlines() if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_tables_are_current(page):
    """`python bench/tables.py` writes them."""
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem
)
def test_results_name_a_commit_of_this_history(path):
    """A machine without the history is given the commit by hand, and a hand can err.

    And it is the commit of what ran: a tree with changes has none.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    commit = json.loads(path.read_text(encoding="utf-8"))["where"]["commit"]
    assert not commit.endswith("-dirty")
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("needs the whole git history, which this checkout does not have")
    assert git("cat-file", "-e", f"{commit}^{{commit}}").returncode == 0


def test_the_version_is_in_the_changelog():
    assert f"## {lf.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
