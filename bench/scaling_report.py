"""What the roofline model says of each row of scaling.py, and of a 70B model. Draws the plot.

    python bench/scaling_report.py                  of results/scaling-h200.json
    python bench/scaling_report.py --of scaling-cpu --images /tmp

The steps run on the device "meta", with the rates that scaling.py measured. All numbers of the 70B
model are predictions: nothing of it was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import scaling
import torch
from common import read, write
from matplotlib.figure import Figure
from roofline import Rates, Work, predicted
from sweep.plots import png
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA_70B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
}
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def works(model: Any, row: scaling.Row, rates: Rates, dtype: torch.dtype) -> dict[str, Work]:
    """The work of the base and of ours."""
    each = scaling.forwards(model, row, dtype)
    return {who: predicted(forward, wanted, rates) for who, (forward, wanted) in each.items()}


def told(work: dict[str, Work], rates: Rates) -> dict[str, Any]:
    """As scaling.py says it."""
    ms = {who: 1e3 * own.seconds(rates) for who, own in work.items()}
    return {
        "milliseconds": ms,
        "over base": ms["ours"] / ms["base"],
        "kernels over base": work["ours"].gpu / work["base"].gpu,
        "operations over base": work["ours"].operations / work["base"].operations,
        "mebibytes": {who: own.peak / 2**20 for who, own in work.items()},
        "mebibytes over base": (work["ours"].peak - work["base"].peak) / 2**20,
    }


def measured_rows(result: dict[str, Any], rates: Rates) -> Iterator[dict[str, Any]]:
    """A prediction for each row."""
    options = argparse.Namespace(**{**result["settings"], "device": "meta"})
    names = scaling.Row.__dataclass_fields__
    shape, model = None, None
    for each in result["rows"]:
        row = scaling.Row(**{name: each[name] for name in names})
        if row.shape != shape:
            shape, model = row.shape, scaling.build(row.shape, options)
        work = works(model, row, rates, getattr(torch, options.dtype))
        yield {**vars(row), **told(work, rates)}


def llama_70b(rates: Rates, tokens: int = 2048) -> Iterator[dict[str, Any]]:
    """Rows of a model of which each GPU has a shard; the tokens are those of one GPU.

    A step gathers all weights twice. The last column is the bandwidth at which this takes no longer
    than the base computes, so that it can be hidden.
    """
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**LLAMA_70B))
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    weights = sum(p.nbytes for p in model.parameters())
    for variant, targets in (("lora", "q, v"), ("lora", "all linear"), ("dora", "all linear")):
        row = scaling.Row("70B", variant, tokens, targets=targets)
        work = works(model, row, rates, torch.bfloat16)
        yield {
            **vars(row),
            **told(work, rates),
            "gibibytes of the weights": weights / 2**30,
            "gigabytes a second to hide": 2 * weights / work["base"].seconds(rates) / 1e9,
        }


def picture(result: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """Points are measured, lines are predicted; a panel for each axis, time above memory."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(2, len(scaling.AXES), sharex="col", sharey="row")
    lines = list(dict.fromkeys((row["shape"], row["variant"]) for row in rows))
    names = {"tokens": "tokens", "r": "rank", "targets": "targets", "K": "adapters in one pass"}
    for column, (axis, name) in enumerate(names.items()):
        for color, line in enumerate(lines):
            for of, style in ((result["rows"], "o"), (rows, "-")):
                own = on_axis(of, axis, line)
                x = [row[axis] for row in own]
                for what, axes in zip(("over base", "mebibytes over base"), panels[:, column]):
                    y = [row[what] for row in own]
                    axes.plot(x, y, style, color=f"C{color}", markersize=4, linewidth=1.2)
        for axes in panels[:, column]:
            if axis != "targets":
                axes.set_xscale("log", base=2)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
        panels[1, column].set_xlabel(name, fontsize=9)
        panels[1, column].set_yscale("log")
    for color, line in enumerate(lines):
        panels[0, 0].plot([], [], "o-", color=f"C{color}", markersize=4, label=" ".join(line))
    panels[0, 0].legend(frameon=False, fontsize=8)
    panels[0, 0].set_ylabel("time / base", fontsize=9)
    panels[1, 0].set_ylabel("MiB over base", fontsize=9)
    figure.suptitle("points: measured; lines: predicted by the roofline model", fontsize=9)
    return figure


def on_axis(rows: list[dict[str, Any]], axis: str, line: tuple[str, str]) -> list[dict[str, Any]]:
    """Those of a line where nothing but `axis` differs from the centre, in its order."""
    order = scaling.AXES[axis]
    found = [
        row
        for row in rows
        if (row["shape"], row["variant"]) == line and "over base" in row and row[axis] in order
    ]
    names = scaling.Row.__dataclass_fields__
    found = [row for row in found if scaling.Row(**{n: row[n] for n in names}).on(axis)]
    return sorted(found, key=lambda row: order.index(row[axis])) if len(found) > 1 else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--of", default="scaling-h200", help="a file of results")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the plot")
    options = parser.parse_args()
    result, _ = read(options.of)
    rates = Rates(**result["rates"])
    rows = []
    for row, beside in zip(measured_rows(result, rates), result["rows"]):
        rows.append(row)
        shown = f"{row['over base']:.2f}, {row['mebibytes over base']:,.0f} MiB"
        if "over base" in beside:
            shown += f"; measured {beside['over base']:.2f}, "
            shown += f"{beside['mebibytes over base']:,.0f} MiB"
        print(*(row[name] for name in scaling.Row.__dataclass_fields__), "|", shown, flush=True)
    drawn = png(picture(result, rows))
    for row in llama_70b(rates):
        rows.append(row)
        print(row, flush=True)
    (options.images / "scaling.png").write_bytes(drawn)
    write("roofline", rows, settings={"of": options.of}, rates=vars(rates))


if __name__ == "__main__":
    main()
