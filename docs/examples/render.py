"""Makes the pages and notebooks of the examples from runs of the scripts.

    python docs/examples/render.py [names]      all scripts without names

A page has the docstring of its script, the code, the output, and the plot if
the script saves one.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LIST = FOLDER.parent / "examples.md"
NO_EXAMPLES = ("toy", "fsdp", "render")  # fsdp.py runs on several ranks
NOTEBOOKS = ("ensemble", "influence", "learning_rate_sweep")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MATPLOTLIBRC": str(FOLDER),
}
SCRIPTS = {
    p.stem: p for p in sorted(FOLDER.glob("*.py")) if p.stem not in NO_EXAMPLES
}


def parts(path: Path) -> tuple[str, str, str]:
    """A script's title, what its docstring says of it, and its code."""
    source = path.read_text(encoding="utf-8")
    statement = ast.parse(source).body[0]
    title, _, text = (ast.get_docstring(ast.parse(source)) or "").partition(
        ": "
    )
    code = "".join(source.splitlines(keepends=True)[statement.end_lineno :])
    return title, text[:1].upper() + text[1:], code.strip("\n")


def page(path: Path, output: str) -> str:
    """The page of a script that printed `output`."""
    title, text, code = parts(path)
    files = [f"[The script]({path.name})"]
    if path.stem in NOTEBOOKS:
        files.append(f"[as a notebook]({path.stem}.ipynb)")
    if "from toy import" in code:
        files.append("[toy.py](toy.py), the model and the data")
    plot = path.with_suffix(".png")
    blocks = [
        f"# {title}",
        text,
        f"![What the script plots]({plot.name})" if plot.name in code else "",
        f"```python\n{code}\n```",
        "It prints:",
        f"```text\n{output.rstrip()}\n```",
        " · ".join(files),
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


def output_of(text: str) -> str:
    """What a page says that its script prints."""
    found = re.search(r"^```text\n(.*?)\n```$", text, flags=re.S | re.M)
    return found[1] if found else ""


def run(path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script in `folder`, on one core. Warnings are errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", path],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )


def cells(path: Path) -> list[str]:
    """The code of a script, cut at the lines `# %%`."""
    _, _, code = parts(path)
    return [
        cell.strip("\n") for cell in re.split(r"^(?=# %%)", code, flags=re.M)
    ]


def write_notebook(path: Path) -> None:
    """Executes the cells of a script, and writes them with their outputs."""
    import nbformat  # noqa: PLC0415  (of the session `examples` alone)
    from nbclient import NotebookClient  # noqa: PLC0415

    title, text, _ = parts(path)
    book: Any = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(f"# {title}\n\n{text}", id="about"),
            *(
                nbformat.v4.new_code_cell(cell, id=f"cell-{i}")
                for i, cell in enumerate(cells(path))
            ),
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(FOLDER / "toy.py", folder)
        client = NotebookClient(book, resources={"metadata": {"path": folder}})
        client.execute(env={**os.environ, **ENVIRONMENT})
    for cell in book.cells:
        cell.metadata = {}  # when it ran
        if cell.cell_type == "code":  # tqdm asks for widgets, which it need not
            cell.outputs = [
                o for o in cell.outputs if o.get("name") != "stderr"
            ]
    book.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3"}
    }
    text = json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True)
    path.with_suffix(".ipynb").write_text(text + "\n", encoding="utf-8")


def listed(text: str) -> str:
    """docs/examples.md with its table of all examples."""
    rows = ["| example | what it does |", "|---|---|"]
    for name, path in SCRIPTS.items():
        title, about, _ = parts(path)
        first = about.partition("\n\n")[0].replace("\n", " ")
        rows.append(f"| [{title}](examples/{name}.md) | {first} |")
    table = "<!-- examples -->\n" + "\n".join(rows) + "\n<!-- end -->"
    return re.sub(
        r"<!-- examples -->\n.*?<!-- end -->", lambda _: table, text, flags=re.S
    )


def main(names: list[str]) -> None:
    """Renders the examples of these names, or all."""
    for name in names or SCRIPTS:
        path = SCRIPTS[name]
        with tempfile.TemporaryDirectory() as folder:
            done = run(path, Path(folder))
            if done.returncode:
                sys.exit(f"{path.name}:\n{done.stderr}")
            for plot in Path(folder).glob("*.png"):
                shutil.copy(plot, FOLDER)
        path.with_suffix(".md").write_text(
            page(path, done.stdout), encoding="utf-8"
        )
        if name in NOTEBOOKS:
            write_notebook(path)
        print(f"rendered {name}", flush=True)
    text = LIST.read_text(encoding="utf-8")
    LIST.write_text(listed(text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
