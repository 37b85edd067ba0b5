"""docs/choosing.md: each number that it quotes is that of the committed sweep."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = " ".join((ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").split())
SWEEP = json.loads((ROOT / "bench" / "results" / "sweep-h200.json").read_text(encoding="utf-8"))
ROWS = {row["label"]: row for row in SWEEP["rows"]}
OTHERS = [row for row in SWEEP["rows"] if row["set"] == "configured" and row["label"] != "lora"]
LORA, EVERYWHERE = ROWS["lora"], ROWS["lora, all linear"]


def loss(label: str, kind: str = "test") -> float:
    """The mean over seeds."""
    return statistics.fmean(ROWS[label][kind])


def below(label: str) -> float:
    """Nats below LoRA."""
    return -ROWS[label]["to lora"][0]


def at(label: str, lr: float) -> float:
    """The validation loss at a learning rate."""
    found = {float(rate): losses for rate, losses in ROWS[label]["validation"].items()}
    return statistics.fmean(found[lr])


BETTER = [row for row in OTHERS if row["to lora"][2] < 0]
TIMES = ROWS["dora, all linear"]["milliseconds"] / EVERYWHERE["milliseconds"]
TEXTS = [loss(label, "text") for label in ("delora", "abba", "lora")]


@pytest.mark.parametrize(
    "quote",
    [
        f"on all linear layers reaches {loss('lora, all linear'):.3f} nats, "
        f"on q and v {loss('lora'):.3f}",
        f"LoRA gains {below('lora, r=32'):.4f}, DoRA "
        f"{below('dora, r=32') - below('dora'):.4f}, and EVA "
        f"{below('eva, r=32') - below('eva'):.4f}",
        f"LoRA learns no less than `Full`, {loss('lora, all linear'):.3f} against "
        f"{loss('full fine-tuning'):.3f}",
        f"EVA is {below('eva, nf4'):.3f} nats below LoRA, DoRA not separated from it, PiSSA "
        f"{-below('pissa, nf4'):.3f} above",
        f"of {len(OTHERS) + 1}, {len(BETTER)} beat LoRA on q and v",
        f"at {TIMES:.1f} times the time",
        f"{below('hira'):.3f} and {below('gralora'):.3f} nats below LoRA",
        f"{ROWS['full']['parameters'] / LORA['parameters']:.0f} times the numbers",
        f"{TEXTS[0]:.2f} to {TEXTS[1]:.2f}, where LoRA has {TEXTS[2]:.2f}",
        f"EVA has {at('eva', 0.001):.2f} on validation, LoRA {at('lora', 0.001):.2f}",
        f"{ROWS['lokr']['parameters']:,} and {ROWS['ia3ff']['parameters']:,} for "
        f"{loss('lokr'):.3f} and {loss('ia3ff'):.3f}; LoRA takes {LORA['parameters']:,} for "
        f"{loss('lora'):.3f}",
        f"AntiPaSTO {loss('antipasto'):.3f} and TinyLoRA {loss('tinylora'):.3f} with "
        f"{ROWS['tinylora']['parameters']:,}, the base has {SWEEP['base']['none']['test']:.3f}",
        f"on {SWEEP['settings']['steps'] * SWEEP['settings']['batch']} problems of GSM8K",
    ],
)
def test_a_quoted_number(quote: str):
    assert quote in PAGE


def test_what_it_says_without_numbers():
    assert not any(row["set"] == "configured" for row in SWEEP["rows"][:5])  # all linear leads
    assert all(row["to lora"][0] > EVERYWHERE["to lora"][0] for row in OTHERS)
    assert sorted(row["label"] for row in BETTER if below(row["label"]) > 0.013) == [
        "full",
        "gralora",
        "hira",
    ]
    assert all(0.0065 < below(label) < 0.008 for label in ("eva", "corda", "loraga"))
    assert ROWS["dora, nf4"]["to lora"][1] < 0 < ROWS["dora, nf4"]["to lora"][2]
    assert at("pissa", 0.000316) < at("lora", 0.000316)
    assert at("pissa", 0.00316) > at("lora", 0.00316)
