"""The examples of the docs run as they stand, and their pages and notebooks are what they print.

`nox -s examples` writes these anew. Each script ends with an assertion of what it promises.
"""

from __future__ import annotations

import base64
import json
import re
from importlib import metadata

import pytest
import render
from test_tooling import pins

FOLDER = render.FOLDER

ELSEWHERE = ("qlora",)  # tests/bnb runs it
EXAMPLES = [path for name, path in render.SCRIPTS.items() if name not in ELSEWHERE]
by_name = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
every = pytest.mark.parametrize("path", render.SCRIPTS.values(), ids=lambda path: path.stem)
NUMBER = re.compile(r"[-+]?\d+(?:\.(\d+))?(?:e[-+]\d+)?")
# Other releases draw other numbers.
RELEASES = {name: metadata.version(name).partition("+")[0] for name in ("torch", "transformers")}
AS_WRITTEN = RELEASES.items() <= pins().items()


def alike(found: str, expected: str) -> bool:
    """Whether two texts agree, up to two units in the last place of decimal numbers."""
    if NUMBER.sub("#", found) != NUMBER.sub("#", expected):
        return False
    return all(near(*pair) for pair in zip(NUMBER.finditer(found), NUMBER.finditer(expected)))


def near(found: re.Match[str], expected: re.Match[str]) -> bool:
    """Whether two numbers do. Integers are equal."""
    places = expected[1]
    unit = 10.0 ** -len(places) if places else 0.0
    return abs(float(found[0]) - float(expected[0])) <= 2.1 * unit


@by_name
def test_example(path, tmp_path):
    run = render.run(path, tmp_path)
    assert run.returncode == 0, run.stderr
    plots = [plot.name for plot in tmp_path.glob("*.png")]
    assert plots == ([f"{path.stem}.png"] if (FOLDER / f"{path.stem}.png").exists() else [])
    expected = render.output_of(path.with_suffix(".md").read_text(encoding="utf-8"))
    assert run.stdout.strip()
    assert not AS_WRITTEN or alike(run.stdout.rstrip(), expected), run.stdout


def test_what_counts_as_alike():
    assert alike("loss 1.24, 7 of 9", "loss 1.25, 7 of 9")
    assert not alike("loss 1.20", "loss 1.25")
    assert not alike("6 of 9", "7 of 9")
    assert not alike("loss 1.25", "cost 1.25")


@every
def test_the_page_is_current(path):
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert render.page(path, render.output_of(text)) == text


@every
def test_it_says_what_it_is_for(path):
    title, about, _ = render.parts(path)
    assert title
    assert "\n\nUse it " in about


def test_the_list_is_current():
    text = render.LIST.read_text(encoding="utf-8")
    assert render.listed(text) == text
    assert text.count("](examples/") == len(render.SCRIPTS) + 2  # toy.py and fsdp.py


@pytest.mark.parametrize("name", render.NOTEBOOKS)
def test_the_notebook_is_that_script(name):
    """Its cells are the script's, and it was executed: without errors, with a plot."""
    book = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["source"] for cell in cells] == render.cells(render.SCRIPTS[name])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    printed = "".join(o["text"] for o in outputs if o.get("name") == "stdout")
    page = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert alike(printed.rstrip(), render.output_of(page))
    assert {output.get("name") for output in outputs} <= {"stdout", None}
    plots = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert [len(base64.b64decode(plot)) < 60_000 for plot in plots] == [True]


def test_plots_are_small():
    plots = sorted(path.stem for path in FOLDER.glob("*.png"))
    assert plots == [name for name, p in render.SCRIPTS.items() if f"{name}.png" in p.read_text()]
    assert all((FOLDER / f"{name}.png").stat().st_size < 60_000 for name in plots)
