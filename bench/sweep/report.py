"""The report: one HTML file with tables and plots, the plots as PNG, and the summary as JSON."""

from __future__ import annotations

import base64
import html
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from . import results
from .plots import pictures

TITLES = {
    "curves": "Loss against the learning rate",
    "forest": "Difference to LoRA",
    "parameters": "Loss against parameters",
    "memory": "Loss against memory",
    "forgotten": "Learned and forgotten",
}
HEADERS = ("", "layers", "parameters", "file, KiB", "learning rate", "test loss")
MORE = ("minus LoRA (95 %)", "text", "ms", "MiB")


@dataclass(frozen=True)
class Report:
    """Makes the report of a sweep: report.html, its plots as PNG, and summary.json."""

    results: tuple[Path, ...]
    """Files of results. Several are taken for parts of one sweep."""
    out: Path = Path("outputs/sweep")
    """Folder for the report."""
    images: Path | None = None
    """Folder for the PNGs. Default: that of the report."""


def main(options: Report) -> dict[str, Any]:
    """Writes all files, and returns the summary."""
    summary = results.summary(results.read(options.results))
    drawn = pictures(summary)
    images = options.images or options.out
    for folder in (options.out, images):
        folder.mkdir(parents=True, exist_ok=True)
    for name, png in drawn.items():
        (images / f"sweep-{name}.png").write_bytes(png)
    text = json.dumps(summary, indent=1)
    (options.out / "summary.json").write_text(text + "\n", encoding="utf-8")
    (options.out / "report.html").write_text(page(summary, drawn), encoding="utf-8")
    for line in summary["findings"]:
        print(f"- {line}")
    print(f"wrote {options.out / 'report.html'}")
    return summary


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table. A learning rate at an end of the grid has a mark."""
    layers = row["layers"]
    shown = layers if isinstance(layers, str) else ", ".join(n.rstrip("$") for n in layers)
    compared = "-"
    if any(row["to lora"] or ()):  # LoRA's own is zero
        middle, low, high = row["to lora"]
        compared = f"{middle:+.4f} ({low:+.4f} to {high:+.4f})"
        if low <= 0 <= high:
            compared += " ="
    return [
        row["label"],
        shown.replace("_proj", ""),
        f"{row['parameters']:,}",
        f"{row['file_bytes'] / 1024:,.0f}",
        f"{row['lr']:g}{'!' if row['at_end'] else ''}",
        f"{statistics.fmean(row['test']):.4f}",
        compared,
        f"{statistics.fmean(row['text']):.3f}",
        f"{row['milliseconds']:.1f}",
        f"{row['mebibytes']:,.0f}" if row["mebibytes"] else "-",
    ]


def solved(key: str) -> bool:
    """Whether it is a count of problems."""
    return key.startswith("solved")


def table(summary: dict[str, Any], chosen: str, form: str) -> str:
    """The groups of one set."""
    return tabulate(
        [cells(row) for row in summary["rows"] if row["set"] == chosen],
        headers=[*HEADERS, *MORE],
        tablefmt=form,
        disable_numparse=True,
    )


LEGEND = (
    "Test loss: nats per token of the answers. = : the interval includes zero, so these data do "
    "not separate the two. ! : the best rate lies at an end of the grid. Text: loss on unrelated "
    "text. ms and MiB: of a step of one more member of the population."
)


def about(summary: dict[str, Any]) -> str:
    """The untrained base, the settings, and where it ran."""
    base = "; ".join(
        f"the untrained base{'' if name == 'none' else f' in {name}'} has {row['test']:.4f} on the "
        f"test problems and {row['text']:.3f} on the text"
        for name, row in summary["base"].items()
    )
    s, where, commits = summary["settings"], summary["where"], summary["commits"]
    versions = ", ".join(f"{k} {where[k]}" for k in ("torch", "transformers") if k in where)
    return (
        f"For comparison, {base}. {s['model']}: {s['steps']} steps of {s['batch']} problems, "
        f"{s['seeds']} seeds, r={s['r']}; {s['test']} test problems. {where['device']}; "
        f"{versions}; {'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}."
    )


def intervals(summary: dict[str, Any], form: str) -> str:
    """Problems solved, with Wilson's intervals over all seeds; empty if none were generated."""
    rows = []
    named = [(f"base {name}".removesuffix(" none"), row) for name, row in summary["base"].items()]
    for label, row in [*named, *((row["label"], row) for row in summary["rows"])]:
        for key in filter(solved, row):
            right, of = sum(row[key]["right"]), row[key]["of"] * len(row[key]["right"])
            low, high = results.wilson(right, of)
            shares = f"{right / of:.1%}", f"{low:.1%} to {high:.1%}"
            each = ", ".join(map(str, row[key]["right"]))
            rows.append([label, key.removeprefix("solved "), f"{right} of {of}", *shares, each])
    headers = ["", "problems", "solved", "share", "95 %", "each seed"]
    rows.sort(key=lambda row: row[1])  # one kind of problem after the other
    shown = tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True)
    return shown if rows else ""


def page(summary: dict[str, Any], drawn: dict[str, bytes]) -> str:
    """The whole report as one file."""
    sets = list(dict.fromkeys(row["set"] for row in summary["rows"]))
    tables = "".join(f"<h3>{name}</h3>{table(summary, name, 'html')}" for name in sets)
    images = "".join(
        f"<h2>{title}</h2><img alt='{title}' src='data:image/png;base64,"
        f"{base64.b64encode(drawn[name]).decode()}'>"
        for name, title in TITLES.items()
        if name in drawn
    )
    said = "".join(f"<li>{html.escape(line)}</li>" for line in summary["findings"])
    share = intervals(summary, "html")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>lora_func: the sweep</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; font-size: 12px }}
td, th {{ padding: 1px 9px 1px 0; text-align: left; border-bottom: 1px solid #ddd }}
img {{ max-width: 100% }}
</style>
<h1>The sweep</h1>
<p>{html.escape(about(summary))} The protocol is docs/sweep.md.</p>
<h2>What the numbers say</h2><ul>{said}</ul>
{images}
<h2>All numbers</h2><p>{html.escape(LEGEND)}</p>{tables}
{f"<h3>Problems solved</h3>{share}" if share else ""}
</html>
"""
