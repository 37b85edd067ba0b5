"""From lines of results to a table: what each group learned, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_func import LoraFuncError

from .files import read_rows

SAMPLES = 4000  # of the bootstrap
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}
"""Number of seeds -> half the 95 % interval of a mean, in standard errors."""


@dataclass
class Entry:
    """One group, from all of its rows."""

    key: str
    about: dict[str, Any]  # of its first pass
    curve: dict[float, list[float]]  # learning rate -> validation loss of each seed, inf: diverged
    test: dict[str, Any]
    solved: dict[str, Any]  # what was generated: problems, of how many, and how many are right
    seconds: float  # of a step of one member
    bytes: float  # of one member, at the peak
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nats(self) -> np.ndarray:
        """Of each test problem, `[seeds, problems]`."""
        return np.array(self.test["problems"])

    @property
    def shown_with(self) -> str:
        """The set in tables and plots: quantized bases have their own."""
        about = self.about
        packed = about["quantization"] != "none"
        return f"{about['set']}, {about['quantization']}" if packed else about["set"]

    @property
    def label(self) -> str:
        """Its name in tables and plots."""
        about, fields = self.about, self.about["fields"]
        if about["variant"] == "full" and about["layers"] == "all-linear":
            name = "full fine-tuning"
        else:
            name = about["variant"]
        parts = [name]
        if about["set"] in {"rank", "matched"}:
            parts.append(f"r={fields['r']}")
        if about["layers"] == "all-linear" and name == about["variant"]:
            parts.append("all linear")
        if about["quantization"] != "none":
            parts.append(about["quantization"])
        return ", ".join(parts)


@dataclass
class Table:
    """All groups, and the untrained base of each quantization."""

    entries: list[Entry]
    base: dict[str, dict[str, Any]]
    where: dict[str, str]  # of the last run
    commits: list[str]  # of all runs
    settings: dict[str, Any]

    def reference(self, entry: Entry) -> Entry | None:
        """LoRA as configured, on the same base."""
        for other in self.entries:
            about = other.about
            same = about["quantization"] == entry.about["quantization"]
            if same and about["variant"] == "lora" and about["set"] == "configured":
                return other
        return None

    def of(self, chosen: str, quantization: str = "none") -> list[Entry]:
        """The groups of a set, the best first."""
        found = [
            entry
            for entry in self.entries
            if entry.about["set"] == chosen and entry.about["quantization"] == quantization
        ]
        return sorted(found, key=loss)


def loss(entry: Entry) -> float:
    """Nats per token on the test problems, the mean over seeds."""
    return statistics.fmean(entry.test["test"])


def read(paths: Sequence[Path]) -> Table:
    """The table of one or several files of results.

    Raises LoraFuncError if their settings differ, or if no group is finished.
    """
    rows = [row for path in paths for row in read_rows(path)]
    runs = [row for row in rows if row["kind"] == "run"]
    if not runs:
        raise LoraFuncError(f"no results in {[str(path) for path in paths]}")
    settings = runs[0]["settings"]
    for run in runs:
        if run["settings"] != settings:
            raise LoraFuncError(
                f"the files were made with different settings: {settings} and {run['settings']}"
            )
    entries = []
    solved = {row["group"]: solved_of(row) for row in rows if row["kind"] == "solved"}
    for row in rows:
        if row["kind"] == "test" and row["group"] not in {entry.key for entry in entries}:
            passes = [r for r in rows if r["kind"] == "pass" and r["group"] == row["group"]]
            entries.append(entry_of(row, passes, solved.get(row["group"], {}), settings))
    if not entries:
        raise LoraFuncError("no group is finished yet: run the sweep again, it goes on from there")
    base = {
        row["group"].split("|")[1]: row | solved.get(row["group"], {})
        for row in rows
        if row["kind"] == "base"
    }
    commits = list(dict.fromkeys(run["where"]["commit"] for run in runs))
    return Table(entries, base, runs[-1]["where"], commits, settings)


def solved_of(row: dict[str, Any]) -> dict[str, Any]:
    """The counts of a row, by the kind of problem."""
    return {key: counts for key, counts in row.items() if key.startswith("solved ")}


def entry_of(
    test: dict[str, Any],
    passes: list[dict[str, Any]],
    solved: dict[str, Any],
    settings: dict[str, Any],
) -> Entry:
    """One group. Its costs are those of its first, largest pass."""
    curve: dict[float, list[float]] = {}
    for row in passes:
        seeds = row["seeds"]
        for i, lr in enumerate(row["lrs"]):
            own = row["validation"][i * seeds : (i + 1) * seeds]
            curve[lr] = [math.inf if x is None else x for x in own]
    first = max(passes, key=lambda row: len(row["lrs"]))
    members = len(first["lrs"]) * first["seeds"]
    return Entry(
        key=test["group"],
        about={k: v for k, v in first.items() if k not in {"curves", "validation"}},
        curve=dict(sorted(curve.items())),
        test=test,
        solved=solved,
        seconds=first["seconds"] / settings["steps"] / members,
        bytes=first["peak_bytes"] / members,
        rows=passes,
    )


def interval(differences: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float]:
    """Mean difference in nats per token, and its 95 % interval.

    `differences [seeds, problems]` are paired in both. Seeds and problems are resampled at once.
    """
    seeds, problems = differences.shape
    generator = np.random.default_rng(0)
    of_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), SAMPLES) / seeds
    of_problem = generator.multinomial(problems, np.full(problems, 1 / problems), SAMPLES)
    sums = ((of_seed @ differences) * of_problem).sum(1) / (of_problem @ tokens)
    low, high = np.quantile(sums, [0.025, 0.975])
    return float(differences.mean(0).sum() / tokens.sum()), float(low), float(high)


def difference(entry: Entry, to: Entry) -> tuple[float, float, float]:
    """Of two groups, with its interval: negative if `entry` learned more."""
    return interval(entry.nats - to.nats, np.array(entry.test["answer_tokens"]))


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z, p = 1.96, right / of
    centre = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return centre - half, centre + half


def summary(table: Table) -> dict[str, Any]:
    """All that tables, plots and pages show, without the raw losses."""
    rows = []
    for entry in table.entries:
        reference = table.reference(entry)
        compared = None if reference is None else difference(entry, reference)
        row = {
            "label": entry.label,
            **{k: entry.about[k] for k in ("variant", "fields", "layers", "quantization")},
            "set": entry.shown_with,
            "parameters": entry.about["parameters"],
            "file_bytes": entry.test["file_bytes"],
            "lr": entry.test["lr"],
            "at_end": entry.test["at_end"],
            "validation": {f"{lr:g}": [finite(x) for x in own] for lr, own in entry.curve.items()},
            "test": entry.test["test"],
            "text": entry.test["text"],
            "to lora": compared,
            "milliseconds": 1e3 * entry.seconds,
            "mebibytes": entry.bytes / 2**20,
        }
        rows.append(row | entry.solved)
    base = {
        name: {k: row[k][0] for k in ("validation", "test", "text")} | solved_of(row)
        for name, row in table.base.items()
    }
    return {
        "where": table.where,
        "commits": table.commits,
        "settings": {**table.settings, "model": model_of(table.settings["model"])},
        "base": base,
        "findings": findings(table),
        "rows": sorted(rows, key=lambda row: (row["set"], statistics.fmean(row["test"]))),
    }


def model_of(name: str | None) -> str:
    """The model's name, without the folder of its file."""
    return "SmolLM2-135M-Instruct" if name is None else Path(name).name


def finite(x: float) -> float | None:
    """JSON has no infinity."""
    return x if math.isfinite(x) else None


def findings(table: Table) -> list[str]:
    """What the numbers say, in sentences, and what they do not."""
    found = []
    configured = table.of("configured")
    lora = next((entry for entry in configured if entry.about["variant"] == "lora"), None)
    if lora is None:
        return found
    better, worse, tied = [], [], []
    for entry in configured:
        if entry is not lora:
            _, low, high = difference(entry, lora)
            (better if high < 0 else worse if low > 0 else tied).append(entry.label)
    for names, what in (
        (better, "learn more than LoRA, each with its best learning rate"),
        (tied, "cannot be told from LoRA by these data"),
        (worse, "learn less than LoRA"),
    ):
        if names:
            found.append(f"As configured, {len(names)} {what}: {', '.join(names)}.")
    best = configured[0]
    level = [e.label for e in configured if e is not best and difference(e, best)[1] <= 0]
    also = f" Not separated from it: {', '.join(level)}." if level else ""
    found.append(f"The lowest loss as configured is that of {best.label}.{also}")
    at_end = [entry.label for entry in table.entries if entry.test["at_end"]]
    if at_end:
        found.append(
            f"The best learning rate still lies at an end of the grid: {', '.join(at_end)}."
        )
    return found + published(table, lora)


def published(table: Table, lora: Entry) -> list[str]:
    """Two claims from elsewhere, at our scale."""
    found = []
    plain = [e for e in table.entries if e.about["quantization"] == lora.about["quantization"]]
    by_name = {(e.about["variant"], e.about["set"]): e for e in plain}
    if pissa := by_name.get(("pissa", "configured")):
        parts = []
        for lr in sorted(lora.curve.keys() & pissa.curve.keys()):
            pairs = [b - a for a, b in zip(lora.curve[lr], pissa.curve[lr])]
            if not all(map(math.isfinite, pairs)):
                parts.append(f"{lr:g}: diverged")
                continue
            n = len(pairs)
            half = STUDENT.get(n, 2.262) * statistics.stdev(pairs) / math.sqrt(n) if n > 1 else 0
            parts.append(f"{lr:g}: {statistics.fmean(pairs):+.4f} ± {half:.4f}")
        found.append(
            "PiSSA minus LoRA at equal learning rates, in nats per token on validation (± is the "
            f"95 % interval of Student's t over seeds): {'; '.join(parts)}."
        )
    pairs = [
        ("all-linear", by_name.get(("lora", "all-linear")), by_name.get(("full", "all-linear"))),
        ("configured", lora, by_name.get(("full", "configured"))),
    ]
    for where, small, full in pairs:
        if small is not None and full is not None:
            ratio = small.test["lr"] / full.test["lr"]
            found.append(
                f"LoRA's best learning rate is {ratio:.3g} times that of a dense difference on the "
                f"same layers ({where}): {small.test['lr']:g} and {full.test['lr']:g}. The grid "
                "tells rates apart by a factor of 3."
            )
    return found
