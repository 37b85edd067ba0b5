"""The examples of the docs run as they stand. Each ends with an assertion of what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
NO_EXAMPLES = ("toy.py", "fsdp.py")  # what the others share, and what test_distributed.py runs
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.name not in NO_EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error", path],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_there_is_a_page_for_each():
    page = (FOLDER.parent / "examples.md").read_text(encoding="utf-8")
    for path in EXAMPLES:
        assert f"examples/{path.name}" in page
