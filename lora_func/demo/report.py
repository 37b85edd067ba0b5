"""The report of the demo: a table on the screen, a plot, and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

ROWS = {
    "targets": "{:d}",
    "trainable": "{:,d}",
    "identity error": "{:.3g}",
    "perturbation delta": "{:.3g}",
    "loss before": "{:.3f}",
    "loss after": "{:.3f}",
    "drop %": "{:.1f}",
    "first gradient norm": "{:.3g}",
    "parameter delta": "{:.3g}",
    "reload error": "{:.3g}",
    "base unchanged": "{}",
    "seconds": "{:.0f}",
}


def write_report(folder: Path, result: dict[str, Any]) -> None:
    """Prints the table, and writes `loss.png` and `report.md`."""
    table = [(name, form.format(result[name])) for name, form in ROWS.items()]
    headers = ("", result["variant"])
    print("\n" + tabulate(table, headers=headers, tablefmt="github", disable_numparse=True))
    print(f"\n{result['question']}\n")
    print(f"before: {result['completion before']}\n")
    print(f"after:  {result['completion after']}\n")
    plot_losses(folder / "loss.png", result)
    ran_on = ", ".join(f"{name} {value}" for name, value in result["ran on"].items())
    page = f"""# {result["variant"]} on {result["model"]}

Data: {result["data"]}. Ran on {ran_on}.

{tabulate(table, headers=("", ""), tablefmt="github", disable_numparse=True)}

The loss is that of the answers, on held-out examples.
Identity error: the largest difference to the logits of the base model before training.
Perturbation delta: the same after a small change of every parameter; 0 means an inert adapter.
Base unchanged: whether the model's parameters and buffers have the same bits before and after
training. Their hash before is {result["base hash"]}.

![loss](loss.png)

## A held-out question

> {quoted(result["question"])}

Before:

> {quoted(result["completion before"])}

After:

> {quoted(result["completion after"])}
"""
    (folder / "report.md").write_text(page, encoding="utf-8")
    print(f"wrote {folder}/: adapter.safetensors, loss.png, report.md, result.json")


def quoted(text: str) -> str:
    """The lines of a text as one quotation in Markdown, without the first mark."""
    return text.strip().replace("\n", "\n> ")


def plot_losses(path: Path, result: dict[str, Any]) -> None:
    """Draws the loss of every step, and the losses on held-out examples before and after."""
    losses = result["losses"]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="C0", linewidth=1.2, label="training batch")
    ends = [result["loss before"], result["loss after"]]
    axes.plot(
        [0, len(losses)], ends, "o--", color="C1", linewidth=1, label="held out, before and after"
    )
    axes.set(
        xlabel="step", ylabel="loss of the answers (nats per token)", title=f"{result['variant']}"
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
