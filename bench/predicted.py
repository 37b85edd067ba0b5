"""The calculator beside what a GPU measured: the same steps, on the device "meta".

They are those of results/overhead-h100.json and cost-h200.json. `python bench/predicted.py`
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import cost
import overhead
import torch
from common import qwen3, read, write
from torch import Tensor

import lora_func as lf
from lora_func.calculator import MiB, Step, loss_of, step

NEEDS_DATA = ("eva", "loftq", "ssteer")
"""Rows that train what LoRA trains, or nothing, and that cannot be made without data."""


def language_model() -> Iterator[dict[str, Any]]:
    """The rows of overhead.py on the H100: the shape of Qwen3-0.6B."""
    result, _ = read("overhead-h100")
    s = argparse.Namespace(**{**result["settings"], "device": "meta"})
    model = qwen3(s.layers, "meta", getattr(torch, s.dtype))
    size = (s.batch, s.tokens, 1024)
    embeds = torch.empty(size, device="meta", dtype=getattr(torch, s.dtype)).requires_grad_()
    batch = {"inputs_embeds": embeds, "use_cache": False, "logits_to_keep": 1}
    base = step(lambda: loss_of(model(**batch)), [embeds])
    yield row("the base", base, result["rows"][0]["mebibytes"]["base"])
    for each in result["rows"]:
        kind, names = overhead.contender(each["variant"], s.r)
        targets = lf.Targets(names=tuple(rf"\.{name}$" for name in names), roles=())
        adapter, leaves = trainable(model, kind, targets=targets)
        forward = functools.partial(adapter, model, leaves, batch)
        found = step(lambda run=forward: loss_of(run()), [embeds, *leaves.values()])
        yield row(each["variant"], found, each["mebibytes"]["ours"])


def layers() -> Iterator[dict[str, Any]]:
    """The rows of cost.py on the H200: layers in the shapes of an 8B model."""
    result, _ = read("cost-h200")
    s = argparse.Namespace(**{**result["settings"], "device": "meta"})
    model = cost.stack(s)
    x = torch.empty(s.batch, s.tokens, s.hidden, device="meta", dtype=getattr(torch, s.dtype))
    toward = torch.empty_like(x.requires_grad_())
    base = step(lambda: model(x), [x], toward)
    yield row("the base", base, result["rows"][0]["mebibytes"]["base"])
    for each in result["rows"]:
        if (name := each["variant"]) not in NEEDS_DATA:
            variant = cost.variant_of(name, s.r)
            stats = cost.stats_of(variant, model, x)
            adapter, leaves = trainable(model, variant, targets=cost.TARGETS, stats=stats)
            forward = functools.partial(adapter, model, leaves, x)
            yield row(name, step(forward, [x, *leaves.values()], toward), each["mebibytes"]["ours"])


def row(variant: str, found: Step, measured: float) -> dict[str, Any]:
    """Peaks in MiB."""
    return {"variant": variant, "counted": found.peak / MiB, "measured": measured}


def trainable(
    model: Any, variant: lf.Variant, **options: Any
) -> tuple[lf.Adapter, dict[str, Tensor]]:
    """`lf.adapt`, with leaves that require grad."""
    adapter, params = lf.adapt(model, variant, **options)
    return adapter, {key: leaf.requires_grad_() for key, leaf in params.items()}


def main() -> None:
    """Prints and writes all rows."""
    rows = []
    for of, found in (("overhead-h100", language_model()), ("cost-h200", layers())):
        for each in found:
            rows.append({"of": of, **each})
            off = each["counted"] / each["measured"] - 1
            print(f"{each['variant']:22s}{each['counted']:9,.1f} MiB {off:+.1%}", flush=True)
    write("predicted", rows, settings={"device": "meta"})


if __name__ == "__main__":
    main()
