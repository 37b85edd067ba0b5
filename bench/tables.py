"""Writes the tables of README and docs from the catalogue and the committed results: `python bench/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A test fails where one is not what this would write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from tabulate import tabulate

import lora_func as lf
from lora_func.card import TARGETS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def markdown(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def trainable(card: lf.Card) -> str:
    """ "A `[r, d_in]`, B `[d_out, r]`", in the spelling of the papers."""
    pretty = {n: s.replace(" // ", " / ").replace(" * ", " ") for n, s in card.trainable.items()}
    return ", ".join(f"{name} `[{shape}]`" for name, shape in pretty.items()) or "nothing"


def variants() -> str:
    """From the cards of the catalogue."""
    rows = [
        [
            f"`{kind.__name__}`",
            kind.card.title,
            f"[{kind.card.authors}](https://{kind.card.url})",
            trainable(kind.card),
        ]
        for kind in lf.VARIANTS.values()
    ]
    return markdown(rows, ["class", "what it does", "paper", "trainable, per layer"])


AT_INIT = {
    "exact": "the base, to the bit",
    "rounding": "up to rounding",
    "moved": "moved by design",
}
READS = {
    "nothing": "nothing",
    "init": "the matrix once, at init",
    "rows": "the matrix at init, r rows per call",
}
DATA = {"none": "no", "optional": "if given", "required": "yes"}


def methods() -> str:
    """What else the cards say: for choosing, and for coming from PEFT."""
    rows = []
    for kind in lf.VARIANTS.values():
        card = kind.card
        config = "-"
        if card.peft is not None:
            fields = ", ".join(
                f"{k}={v!r}" for k, v in card.peft.fields.items() if v not in ([], TARGETS)
            )
            config = f"`{card.peft.config}({fields})`"
        lr = f"{card.lr:g}" if card.trainable else "-"
        cells = [AT_INIT[card.at_init], READS[card.reads], DATA[card.data], lr, config]
        rows.append([f"`{kind.__name__}`", *cells, card.beside_peft])
    headers = [
        "class",
        "at init",
        "reads of the weight",
        "calibration",
        "lr",
        "in PEFT",
        "beside it",
    ]
    return markdown(rows, headers)


def reference() -> str:
    """The entries of the API page."""
    return "\n\n".join(f"::: {kind.__module__}.{kind.__name__}" for kind in lf.VARIANTS.values())


def ran_on(result: dict) -> str:
    where = dict(result["where"])
    versions = ", ".join(
        f"{name} {where[name]}"
        for name in ("torch", "transformers", "peft", "bitsandbytes")
        if name in where
    )
    return f"{where['device']}; {versions}; commit {where['commit']}"


def overhead(kind: str) -> str:
    result = json.loads((RESULTS / f"overhead-{kind}.json").read_text())
    s = result["settings"]
    rows = [
        [
            row["variant"],
            str(row["targets"]),
            f"{row['time over base']['ours']:.2f}",
            f"{row['time over base']['peft']:.2f}",
            f"{row['mebibytes']['ours'] - row['mebibytes']['base']:,.0f}",
            f"{row['mebibytes']['peft'] - row['mebibytes']['base']:,.0f}",
        ]
        for row in result["rows"]
    ]
    table = markdown(
        rows,
        [
            "variant",
            "layers",
            "time / base",
            "PEFT: time / base",
            "MiB over base",
            "PEFT: MiB over base",
        ],
    )
    memory = "peak of the step" if s["device"] == "cuda" else "bytes saved for backward"
    about = f"{s['layers']} layers, batch {s['batch']} x {s['tokens']} tokens, {s['dtype']}, r={s['r']}; memory: {memory}."
    return f"{table}\n\n{about} {ran_on(result)}."


def launches(kind: str) -> str:
    result = json.loads((RESULTS / f"launches-{kind}.json").read_text())
    s = result["settings"]
    ways = ["base, eager", "eager", "compiled", "CUDA graph"]
    rows = []
    for row in result["rows"]:
        times = [
            f"{row['milliseconds'][way]:.0f}" if way in row["milliseconds"] else "-" for way in ways
        ]
        rows.append([f"LoRA, {row['targets']} layers", *times])
    table = markdown(
        rows, ["ms per step", "frozen base, eager", "adapted, eager", "torch.compile", "CUDA graph"]
    )
    about = (
        f"{s['layers']} layers, batch {s['batch']} x {s['tokens']} tokens, bfloat16, r={s['r']}."
    )
    return f"{table}\n\n{about} {ran_on(result)}."


def population(kind: str) -> str:
    result = json.loads((RESULTS / f"population-{kind}.json").read_text())
    s = result["settings"]
    ways = ["base", "population", "stacked", "vmap(grad)", "one by one", "peft"]
    rows = []
    for row in result["rows"]:
        times, peaks = row["milliseconds"], row["mebibytes"]
        cells = [f"{times[way] / times['base']:.2f}" if way in times else "-" for way in ways[1:]]
        memory = [
            f"{peaks[way] / peaks['base']:.2f}" if way in peaks else "-"
            for way in ("population", "vmap(grad)")
        ]
        rows.append(
            [
                row["variant"],
                str(row["K"]),
                str(row["examples"]),
                f"{times['base']:.0f}",
                *cells,
                *memory,
            ]
        )
    headers = [
        "variant",
        "K",
        "examples each",
        "base, ms",
        "population",
        "stacked",
        "vmap(grad)",
        "one by one",
        "PEFT",
    ]
    table = markdown(rows, [*headers, "memory: population", "memory: vmap(grad)"])
    memory = "peak of the step" if s["device"] == "cuda" else "bytes saved for backward"
    about = f"{s['layers']} layers, {s['tokens']} tokens, {s['dtype']}, r={s['r']} on q and v; over the base; memory: {memory}."
    return f"{table}\n\n{about} {ran_on(result)}."


def headline(kind: str) -> str:
    """The largest population, in a sentence."""
    result = json.loads((RESULTS / f"population-{kind}.json").read_text())
    row = max(result["rows"], key=lambda row: row["K"])
    ms, mib = row["milliseconds"], row["mebibytes"]
    return (
        f"{row['K']} LoRAs on one {kind.upper()}: {ms['population'] / ms['base']:.2f} times the time and "
        f"{mib['population'] / mib['base']:.2f} times the memory of the frozen base on the same batch, "
        f"{ms['one by one'] / ms['population']:.0f} times faster than one by one."
    )


def view(kind: str) -> str:
    result = json.loads((RESULTS / f"view-{kind}.json").read_text())
    rows = [[row["step"], f"{row['milliseconds']:.1f}"] for row in result["rows"]]
    return f"{markdown(rows, ['28 layers, 56 adapted', 'ms'])}\n\n{ran_on(result)}."


def quantized(kind: str) -> str:
    result = json.loads((RESULTS / f"quantized-{kind}.json").read_text())
    s = result["settings"]
    columns = ["identity error", "gradient norm", "loss", "loss after", "drop %", "mebibytes"]
    apart = "torch.func.grad - autograd, relative"
    rows = [
        [
            row["variant"],
            row["base"],
            *(f"{row[column]:.3g}" for column in columns),
            f"{row[apart]:.0e}",
        ]
        for row in result["rows"]
    ]
    table = markdown(rows, ["variant", "base", *columns[:-1], "MiB", "functional"])
    memory = "peak of a step" if s["device"] == "cuda" else "bytes saved for backward"
    about = f"{s['layers']} layers, batch {s['batch']} x {s['tokens']}, {s['dtype']}, r={s['r']} on q, v and down; MiB: {memory}."
    return f"{table}\n\n{about} {ran_on(result)}."


def profiled(kind: str) -> str:
    result = json.loads((RESULTS / f"profile-{kind}.json").read_text())
    rows = [
        [row["variant"], f"{row['launches']:,}", f"{row['milliseconds']:.0f}"]
        for row in result["rows"]
    ]
    return f"{markdown(rows, ['K=16', 'kernels launched', 'ms for which they run'])}\n\n{ran_on(result)}."


def svd(kind: str) -> str:
    result = json.loads((RESULTS / f"svd-{kind}.json").read_text())
    s = result["settings"]
    rows = [
        [
            row["spectrum"],
            row["way"],
            f"{1e3 * row['seconds']:.0f}",
            f"{row['times faster']:.0f}",
            f"{row['energy']:.4f}",
        ]
        for row in result["rows"]
    ]
    table = markdown(rows, ["spectrum", "SVD", "ms", "times faster", "energy / exact"])
    return f"{table}\n\n{s['n']} x {s['n']}, float32, r={s['r']}. {ran_on(result)}."


def qwen(model: str) -> str:
    result = json.loads((RESULTS / f"qwen-{model}.json").read_text())
    s = result["settings"]
    columns = ["loss0", "lossN", "drop %", "gradient norm", "parameter delta", "reload error"]
    shapes = {shape["variant"]: f"{shape['trainable']:,}" for shape in result["shapes"]}
    rows = [
        [
            row["variant"],
            f"{row['trainable']:,}",
            *(
                f"{row[column]:.3g}"
                for column in ("identity error", "perturbation delta", *columns)
            ),
            f"{row['bytes'] / 1024:.0f}",
            shapes.get(row["variant"], "-"),
        ]
        for row in result["rows"]
    ]
    headers = [
        "variant",
        "trainable",
        "identity error",
        "perturbation delta",
        *columns,
        "file, KiB",
        "all of Qwen3-0.6B, r=32",
    ]
    about = (
        f"{s['model']}, {s['dtype']}, r={s['r']} (of the AntiPaSTO family in both columns 8 times that), {s['steps']} steps of "
        f"AdamW on {s['tokens']} tokens; the base unchanged."
    )
    return f"{markdown(rows, headers)}\n\n{about} {ran_on(result)}."


TABLES: dict[str, Callable[[], str]] = {
    "variants": variants,
    "methods": methods,
    "reference": reference,
    "overhead-cpu": lambda: overhead("cpu"),
    "overhead-h100": lambda: overhead("h100"),
    "launches-h100": lambda: launches("h100"),
    "population-headline": lambda: headline("h100"),
    "view-cpu": lambda: view("cpu"),
    "quantized-cpu": lambda: quantized("cpu"),
    "quantized-h100": lambda: quantized("h100"),
    "profile-h100": lambda: profiled("h100"),
    "svd-h200": lambda: svd("h200"),
    "qwen": lambda: qwen("smollm2-135m-instruct.q4_1-cpu"),
    "population-cpu": lambda: population("cpu"),
    "population-h100": lambda: population("h100"),
}


def filled(text: str) -> str:
    """`text` with every table as the catalogue and the results have it."""

    def table(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", table, text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
