"""The pictures of the report, from its summary."""

from __future__ import annotations

import io
import math
import statistics
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]
COLORS = {"configured": "C0", "all-linear": "C1", "rank": "C2", "matched": "C3"}


def pictures(summary: dict[str, Any]) -> dict[str, bytes]:
    """Name -> PNG."""
    drawn = {
        "curves": curves(summary),
        "forest": forest(summary),
        "parameters": against(summary, "parameters", "trainable parameters"),
        "forgotten": forgotten(summary),
    }
    if any(row["mebibytes"] for row in summary["rows"]):
        drawn["memory"] = against(summary, "mebibytes", "peak memory of a member, MiB")
    return {name: png(figure) for name, figure in drawn.items()}


def png(figure: Figure) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def mean(row: Row) -> float:
    """Its loss on the test problems."""
    return statistics.fmean(row["test"])


def points(row: Row) -> tuple[list[float], list[list[float]]]:
    """Learning rates at which no seed diverged, and the losses of the seeds there."""
    kept = {float(lr): own for lr, own in row["validation"].items() if None not in own}
    return list(kept), list(kept.values())


def curves(summary: dict[str, Any], columns: int = 6) -> Figure:
    """Validation loss against the learning rate: a panel for each variant, LoRA in grey in all."""
    rows = [row for row in summary["rows"] if row["set"] == "configured"]
    rows = [row for row in rows if row["quantization"] == "none"] or summary["rows"]
    base = summary["base"].get("none", {}).get("validation")
    lora = next((row for row in rows if row["variant"] == "lora"), None)
    height = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(2.1 * columns, 1.75 * height + 0.7), layout="constrained")
    panels = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False).flatten()
    best = min(min(map(statistics.fmean, points(row)[1]), default=math.inf) for row in rows)
    top = base if base is not None else best + 1
    for row, axes in zip(rows, panels):
        if lora is not None:
            lrs, losses = points(lora)
            axes.plot(lrs, [statistics.fmean(own) for own in losses], color="0.75", linewidth=2)
        lrs, losses = points(row)
        middle = [statistics.fmean(own) for own in losses]
        axes.fill_between(lrs, list(map(min, losses)), list(map(max, losses)), alpha=0.3, lw=0)
        axes.plot(lrs, middle, "o-", markersize=2.5, linewidth=1.2, color="C0")
        if row["lr"] in lrs:
            axes.plot(row["lr"], middle[lrs.index(row["lr"])], "*", color="C3", markersize=9)
        if base is not None:
            axes.axhline(base, color="0.5", linestyle=":", linewidth=1)
        axes.set_title(row["label"], fontsize=8, pad=2)
        axes.set_xscale("log")
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    panels[0].set_ylim(best - 0.05 * (top - best), top + 0.12 * (top - best))
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("validation loss, nats per token", fontsize=9)
    figure.suptitle(
        "star: chosen; band: all seeds; grey: LoRA; dotted: untrained base. "
        "Points are left out where a seed diverged.",
        fontsize=8,
    )
    return figure


def forest(summary: dict[str, Any]) -> Figure:
    """Paired differences to LoRA, with their intervals; each set has a color."""
    rows = [row for row in summary["rows"] if any(row["to lora"] or ())]
    rows = sorted(rows, key=lambda row: -row["to lora"][0])
    figure = Figure(figsize=(7.5, 0.19 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        middle, low, high = row["to lora"]
        color = COLORS.get(row["set"], "C4")
        axes.plot([low, high], [y, y], color=color, linewidth=1.6)
        axes.plot(middle, y, "o", color=color, markersize=3.5)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=7)
    axes.set_ylim(-1, len(rows))
    axes.set_xlabel("test loss minus LoRA's, nats per token (95 %); left is better", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    for name in dict.fromkeys(row["set"] for row in rows):
        axes.plot([], [], "o-", color=COLORS.get(name, "C4"), label=name)
    axes.legend(frameon=False, fontsize=7, loc="best")
    return figure


def against(summary: dict[str, Any], column: str, label: str) -> Figure:
    """Test loss against what a method costs."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for row in summary["rows"]:
        if row[column]:
            axes.plot(row[column], mean(row), "o", color=COLORS.get(row["set"], "C4"), markersize=4)
            axes.annotate(
                row["label"],
                (row[column], mean(row)),
                xytext=(3, 2),
                textcoords="offset points",
                fontsize=5.5,
            )
    if column == "parameters":
        axes.set_xscale("log")
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("test loss, nats per token", fontsize=9)
    legend(axes, summary)
    return figure


def forgotten(summary: dict[str, Any]) -> Figure:
    """What was forgotten against what was learned."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for row in summary["rows"]:
        x, y = mean(row), statistics.fmean(row["text"])
        axes.plot(x, y, "o", color=COLORS.get(row["set"], "C4"), markersize=4)
        axes.annotate(row["label"], (x, y), xytext=(3, 2), textcoords="offset points", fontsize=5.5)
    for base in summary["base"].values():
        axes.axhline(base["text"], color="0.5", linestyle=":", linewidth=1)
    axes.set_xlabel("test loss, nats per token: left learned more", fontsize=9)
    axes.set_ylabel("loss on unrelated text: above the dotted line, forgotten", fontsize=9)
    legend(axes, summary)
    return figure


def legend(axes: Any, summary: dict[str, Any]) -> None:
    """The sets and their colors."""
    for name in dict.fromkeys(row["set"] for row in summary["rows"]):
        axes.plot([], [], "o", color=COLORS.get(name, "C4"), label=name)
    axes.legend(frameon=False, fontsize=7)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
