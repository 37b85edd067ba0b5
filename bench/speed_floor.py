"""What the steps of `speed.py` ask of a GPU, counted by the roofline model, beside what they took.

Kernels and operations over those of the base. The first is what a step should take where the GPU is
busy all the time, as in a CUDA graph; the second, where it waits for the CPU. No GPU is needed: the
steps run on the device "meta", with the rates that scaling.py measured.
`python bench/speed_floor.py`
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import roofline
import torch
from common import commit, read, write
from matplotlib.figure import Figure
from scaling_report import IMAGES, png
from speed import ROWS, Contenders, Row, loss
from torch import Tensor

from lora_func.calculator import Live
from lora_func.libraries.cuda_kernels import AsOnCUDA

WAYS = ("eager", "checkpointing", "graph", "population")
"""Of which the steps can be counted."""


def counted(row: Row, rates: roofline.Rates, options: argparse.Namespace) -> dict[str, Any]:
    """A row."""
    forwards = Contenders(row, options).forwards()
    base, ours = (roofline.predicted(*forwards[who], rates) for who in ("base", "ours"))
    return {
        **vars(row),
        "commit": commit(),
        "kernels over base": ours.gpu / base.gpu,
        "operations over base": ours.operations / base.operations,
        "flops over base": ours.flops / base.flops,
        "bytes over base": ours.moved / base.moved,
        "mebibytes over base": (ours.peak - base.peak) / 2**20,
    }


def of_base(rates: roofline.Rates, options: argparse.Namespace) -> dict[str, float]:
    """MiB at the peak of a step of the base, plain and by torch.func.grad: 8 layers of the 8B."""
    contenders = Contenders(Row("8B", 8, 2, 2048, "eager", "lora", "q, v"), options)
    plain = roofline.predicted(*contenders.forwards()["base"], rates).peak

    def loss_at(embeds: Tensor) -> Tensor:
        return loss(contenders.model(**{**contenders.batch, "inputs_embeds": embeds}))

    with Live() as live, AsOnCUDA():
        torch.func.grad(loss_at)(contenders.embeds.detach())
    return {"plain": plain / 2**20, "torch.func.grad": live.peak / 2**20}


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What is measured together."""
    return tuple(row[name] for name in Row.__dataclass_fields__)


def picture(measured: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Figure:
    """A line for each row of speed.py: PEFT, ours, and what is counted."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    floors = {identity(row): row for row in rows}
    marks = {"peft": ("PEFT", "x", "C3"), "ours": ("ours, a call", "o", "C0")}
    marks["bound"] = ("ours, bound", "D", "C2")
    for height, row in enumerate(reversed(measured)):
        times = row["over base"]
        axes.plot([1, max(times.values())], [height] * 2, color="0.85", linewidth=1, zorder=0)
        for who, (_, mark, color) in marks.items():
            if who in times:
                axes.plot(times[who], height, mark, color=color, markersize=5)
        if floor := floors.get(identity(row)):
            axes.plot(floor["kernels over base"], height, "|", color="k", markersize=12)
    for name, mark, color in (*marks.values(), ("counted: kernels", "|", "k")):
        axes.plot([], [], mark, color=color, label=name)
    axes.set_yticks(range(len(measured)))
    labels = [
        f"{row['shape']}, {row['layers']} layers, {row['way']}: {row['variant']}, {row['targets']}"
        for row in reversed(measured)
    ]
    axes.set_yticklabels(labels, fontsize=8)
    axes.set_xscale("log")
    ticks = [1, 1.1, 1.25, 1.5, 2, 3, 5]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("time of a step / time of the base's")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--of", default="speed-h200", help="the results of speed.py")
    parser.add_argument("--rates", default="scaling-h200", help="the results of scaling.py")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the plot")
    given = parser.parse_args()
    rates = roofline.Rates(**read(given.rates)[0]["rates"])
    settings = {"device": "meta", "dtype": "bfloat16", "r": 32, "toy": False, "peft": False}
    options = argparse.Namespace(**settings, most_layers=32, most_tokens=2048)
    rows: list[dict[str, Any]] = []
    for row in ROWS:
        if row.way in WAYS:
            rows.append(counted(row, rates, options))
            print(*rows[-1].values(), flush=True)
    drawn = png(picture(read(given.of)[0]["rows"], rows))
    (given.images / "speed.png").write_bytes(drawn)
    settings |= {"of": given.of, "rates": given.rates}
    write("speed-floor", rows, settings=settings, base=of_base(rates, options))


if __name__ == "__main__":
    main()
