"""The calculator beside what a GPU measured: the same steps, on the device "meta".

`python bench/predicted.py` prints each peak of results/overhead-h100.json and cost-h200.json.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any, NamedTuple

import cost
import overhead
import torch
from common import qwen3, read
from torch import Tensor

import lora_func as lf
from lora_func.calculator import MiB, loss_of, step

NEEDS_DATA = ("eva", "loftq", "ssteer")
"""Rows that train what LoRA trains, or nothing, and that cannot be made without data."""


class Peak(NamedTuple):
    """MiB of a step, of the base alone and adapted."""

    variant: str
    base: float
    measured_base: float
    adapted: float
    measured: float


@functools.cache
def language_model() -> list[Peak]:
    """The rows of overhead.py on the H100: the shape of Qwen3-0.6B."""
    result, _ = read("overhead-h100")
    s = argparse.Namespace(**{**result["settings"], "device": "meta"})
    model = qwen3(s.layers, "meta", getattr(torch, s.dtype))
    size = (s.batch, s.tokens, 1024)
    embeds = torch.empty(size, device="meta", dtype=getattr(torch, s.dtype)).requires_grad_()
    batch = {"inputs_embeds": embeds, "use_cache": False, "logits_to_keep": 1}
    base = step(lambda: loss_of(model(**batch)), [embeds]).peak

    def row(variant: str, mebibytes: dict[str, float]) -> Peak:
        kind, names = overhead.contender(variant, s.r)
        targets = lf.Targets(names=tuple(rf"\.{name}$" for name in names), roles=())
        adapter, leaves = trainable(model, kind, targets=targets)
        wanted = [embeds, *leaves.values()]
        peak = step(lambda: loss_of(adapter(model, leaves, batch)), wanted).peak
        return Peak(variant, base / MiB, mebibytes["base"], peak / MiB, mebibytes["ours"])

    return [row(each["variant"], each["mebibytes"]) for each in result["rows"]]


@functools.cache
def layers() -> list[Peak]:
    """The rows of cost.py on the H200: layers in the shapes of an 8B model."""
    result, _ = read("cost-h200")
    s = argparse.Namespace(**{**result["settings"], "device": "meta"})
    model = cost.stack(s)
    x = torch.empty(s.batch, s.tokens, s.hidden, device="meta", dtype=getattr(torch, s.dtype))
    toward = torch.empty_like(x.requires_grad_())
    base = step(lambda: model(x), [x], toward).peak

    def row(name: str, mebibytes: dict[str, float]) -> Peak:
        variant = cost.variant_of(name, s.r)
        stats = cost.stats_of(variant, model, x)
        adapter, leaves = trainable(model, variant, targets=cost.TARGETS, stats=stats)
        peak = step(lambda: adapter(model, leaves, x), [x, *leaves.values()], toward).peak
        return Peak(name, base / MiB, mebibytes["base"], peak / MiB, mebibytes["ours"])

    rows = [each for each in result["rows"] if each["variant"] not in NEEDS_DATA]
    return [row(each["variant"], each["mebibytes"]) for each in rows]


def trainable(
    model: Any, variant: lf.Variant, **options: Any
) -> tuple[lf.Adapter, dict[str, Tensor]]:
    """`lf.adapt`, with leaves that require grad."""
    adapter, params = lf.adapt(model, variant, **options)
    return adapter, {key: leaf.requires_grad_() for key, leaf in params.items()}


if __name__ == "__main__":
    for peak in (*language_model(), *layers()):
        off = peak.adapted / peak.measured - 1
        print(f"{peak.variant:22s}{peak.adapted:9,.1f} {peak.measured:9,.1f} MiB {off:+.1%}")
