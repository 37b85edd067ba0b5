"""The report of the demo: a table on the screen, a plot, and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

ROWS = {
    "targets": "{:d}",
    "trainable": "{:,d}",
    "learning rate": "{:.3g}",
    "identity error": "{:.3g}",
    "perturbation delta": "{:.3g}",
    "loss before": "{:.3f}",
    "loss after": "{:.3f}",
    "drop %": "{:.1f}",
    "exact match before": "{}",
    "exact match after": "{}",
    "first gradient norm": "{:.3g}",
    "parameter delta": "{:.3g}",
    "reload error": "{:.3g}",
    "base unchanged": "{}",
    "seconds": "{:.0f}",
}

EXACT = ("exact match before", "exact match after")


def write_report(folder: Path, result: dict[str, Any]) -> None:
    """Prints the table, and writes `loss.png` and `report.md`."""
    shown = {**result, **{name: share(result[name]) for name in EXACT}}
    table = markdown([(name, form.format(shown[name])) for name, form in ROWS.items()])
    print(f"\n{result['variant']}\n\n{table}\n\n{verdict(result)}")
    plot_losses(folder / "loss.png", result)
    ran_on = ", ".join(f"{name} {value}" for name, value in result["ran on"].items())
    held_out = [(step, f"{loss:.3f}") for step, loss in result["held-out losses"]]
    page = f"""# {result["variant"]} on {result["model"]}

Data: {result["data"]}. Ran on {ran_on}.

**{verdict(result)}**

{table}

The loss is that of the answers, on held-out examples, in nats per token.
Exact match: the share of held-out problems whose answer is right, by greedy decoding, with Wilson's
95 % interval. What counts is the first number after "####", or else the last number.
Identity error: the largest difference to the logits of the base model before training.
Perturbation delta: the same after a small change of every parameter; 0 means an inert adapter.
Base unchanged: whether the model's parameters and buffers have the same bits before and after
training. Their hash before is {result["base hash"]}.

![loss](loss.png)

{markdown(held_out, ("step", "held-out loss"))}
{by_rate(result)}
## The first {len(result["samples"])} held-out problems
{"".join(map(sample, result["samples"]))}"""
    (folder / "report.md").write_text(page, encoding="utf-8")
    print(f"wrote {folder}/: adapter.safetensors, loss.png, report.md, result.json")


def markdown(rows: list[tuple[Any, ...]], headers: tuple[str, ...] = ("", "")) -> str:
    """A table. Numbers stay as they are written."""
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def share(exact: dict[str, Any]) -> str:
    """Problems solved, and the interval of their share."""
    low, high = exact["interval"]
    return f"{exact['right']} of {exact['of']} ({100 * low:.0f} % to {100 * high:.0f} %)"


def verdict(result: dict[str, Any]) -> str:
    """What became of exact match, in plain words."""
    before, after = (result[name] for name in EXACT)
    numbers = f"{before['right']} before training and {after['right']} after, of {after['of']}"
    if after["right"] <= before["right"]:
        return f"Exact match did not improve: {numbers} held-out problems."
    if after["interval"][0] <= before["interval"][1]:
        return f"Exact match rose, but the intervals overlap: {numbers} held-out problems."
    return f"Exact match improved: {numbers} held-out problems."


def sample(one: dict[str, Any]) -> str:
    """A question, and the completions before and after, each with a tick or a cross."""
    parts = [f"\n> {quoted(one['question'])}\n\nRight is {one['answer']}.\n"]
    for when in ("before", "after"):
        mark = "✓" if one[when]["right"] else "✗"
        parts.append(f"\n{mark} {when}:\n\n> {quoted(one[when]['completion'])}\n")
    return "".join(parts)


def by_rate(result: dict[str, Any]) -> str:
    """The loss of each learning rate; nothing if there was but one."""
    losses = result["losses by learning rate"]
    if len(losses) == 1:
        return ""
    table = markdown(
        [(f"{lr:.2g}", f"{loss:.3f}") for lr, loss in losses],
        ("learning rate", "held-out loss after training"),
    )
    return f"""
## Learning rates

{len(losses)} adapters trained in one pass of the model, on the same batches. All else on this
page is of the learning rate {result["learning rate"]:.3g}, which was chosen before.

{table}
"""


def quoted(text: str) -> str:
    """The lines of a text as one quotation in Markdown, without the first mark."""
    return text.strip().replace("\n", "\n> ")


def plot_losses(path: Path, result: dict[str, Any]) -> None:
    """Draws the loss in training and on held-out examples, and the loss of each learning rate."""
    losses, rates = result["losses"], result["losses by learning rate"]
    panels = 1 if len(rates) == 1 else 2
    figure = Figure(figsize=(6 * panels, 3.5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    axes[0].plot(
        range(1, len(losses) + 1), losses, color="C0", linewidth=1.2, label="training batch"
    )
    axes[0].plot(*zip(*result["held-out losses"]), "o-", color="C1", label="held out")
    axes[0].set(
        xlabel="step", ylabel="loss of the answers (nats per token)", title=f"{result['variant']}"
    )
    axes[0].legend(frameon=False)
    if panels == 2:
        axes[1].semilogx(*zip(*rates), "o-", color="C1")
        axes[1].axvline(result["learning rate"], color="0.6", linestyle=":", label="on this page")
        axes[1].set(xlabel="learning rate", title="held-out loss after training")
        axes[1].legend(frameon=False)
    for panel in axes:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
