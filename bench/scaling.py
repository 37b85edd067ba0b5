"""How the cost of an adapter grows: with tokens, rank, targets, adapters in one pass, and model.

One of these varies at a time, around a centre. A step is a forward, and a backward to the input
embeddings and to the adapter. All layers of a model are alike, so a few of the 8B model tell what
one costs. K adapters have a sequence each. A row is written as soon as it is measured.

`python bench/scaling.py --help`. Then scaling_report.py compares it with the roofline model.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import roofline
import speed
import torch
from common import commit, interleaved, peak, qwen3, ratio, repeated, write
from torch import Tensor

import lora_func as lf

AXES: dict[str, tuple[Any, ...]] = {
    "tokens": (256, 1024, 4096, 16384, 32768),
    "r": (4, 16, 32, 64, 256),
    "targets": tuple(speed.TARGETS),
    "K": (1, 4, 16, 64, 256),
}
LAYERS = {"8B": 4, "0.6B": 28}
TOY: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class Row:
    """What is measured together. By default, the centre."""

    shape: str
    variant: str
    tokens: int = 4096
    r: int = 32
    targets: str = "all linear"
    K: int = 1

    @property
    def sequences(self) -> int:
        """One for each adapter, of at most 2048 tokens."""
        return max(self.K, math.ceil(self.tokens / 2048))

    def on(self, axis: str) -> bool:
        """Whether nothing but `axis` differs from the centre."""
        return dataclasses.replace(self, **{axis: getattr(Row, axis)}) == Row(
            self.shape, self.variant
        )


def rows() -> Iterator[Row]:
    """Every row once."""
    for shape, variant in (("8B", "lora"), ("0.6B", "lora"), ("8B", "dora")):
        yield Row(shape, variant)
        for axis in AXES if variant == "lora" else ("tokens", "r"):
            for value in AXES[axis]:
                if value != getattr(Row, axis):
                    yield Row(shape, variant, **{axis: value})


def build(shape: str, options: argparse.Namespace) -> Any:
    """A frozen model with random weights."""
    layers = min(LAYERS[shape], options.most_layers)
    if shape == "0.6B":
        dtype = getattr(torch, options.dtype)
        return qwen3(layers, options.device, dtype, **(TOY if options.toy else {}))
    return speed.build(speed.Row(shape, layers, 1, 1, "eager", "lora", ""), options)


def forwards(
    model: Any, row: Row, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], Tensor], Sequence[Tensor]]]:
    """Who -> the loss, and what it is derived by."""
    kind: Any = lf.VARIANTS[row.variant]
    names = tuple(rf"\.{name}$" for name in speed.TARGETS[row.targets])
    adapter, params = lf.adapt(model, kind(r=row.r), targets=lf.Targets(names=names, roles=()))
    if row.K > 1:
        params = {key: leaf.clone() for key, leaf in lf.expand(params, row.K).items()}
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    size = (row.sequences, row.tokens // row.sequences, model.config.hidden_size)
    embeds = 0.02 * torch.randn(size, device=model.device, dtype=dtype)
    batch = {"inputs_embeds": embeds.requires_grad_(), "use_cache": False, "logits_to_keep": 1}
    return {
        "base": (lambda: speed.loss(model(**batch)), [embeds]),
        "ours": (lambda: speed.loss(adapter(model, leaves, batch)), [embeds, *leaves.values()]),
    }


def measure(model: Any, row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Times over the base, and memory."""
    try:
        runs = forwards(model, row, getattr(torch, options.dtype))
        steps = {who: speed.stepped(forward, wanted) for who, (forward, wanted) in runs.items()}
        loops = {who: repeated(step, options.in_a_row) for who, step in steps.items()}
        times = interleaved(loops, options.rounds, warmup=1)
        times = {who: [t / options.in_a_row for t in own] for who, own in times.items()}
        peaks = {who: peak(step) / 2**20 for who, step in steps.items()}
    except torch.OutOfMemoryError as error:
        return {**vars(row), "error": str(error).partition("\n")[0][:200]}
    return {
        **vars(row),
        "commit": commit(),
        "sequences": row.sequences,
        "milliseconds": {who: 1e3 * statistics.median(ts) for who, ts in times.items()},
        "over base": ratio(times, "ours", "base"),
        "mebibytes": peaks,
        "mebibytes over base": peaks["ours"] - peaks["base"],
        "seconds of each round": times,
    }


def tiny_step(model: Any, options: argparse.Namespace) -> Callable[[], Any]:
    """A step of the base on 16 tokens: the GPU waits for the CPU all the time."""
    row = Row(options.shapes[0], "lora", tokens=16)
    return speed.stepped(*forwards(model, row, getattr(torch, options.dtype))["base"])


def main() -> None:
    cuda, began = torch.cuda.is_available(), time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--toy", action="store_true", help="tiny widths, to try the script")
    parser.add_argument("--most-layers", type=int, default=28 if cuda else 2)
    parser.add_argument("--most-tokens", type=int, default=32768 if cuda else 4096)
    parser.add_argument("--most-K", type=int, default=256 if cuda else 16)
    parser.add_argument("--rounds", type=int, default=5 if cuda else 3)
    parser.add_argument("--in-a-row", type=int, default=4 if cuda else 1, help="steps of a round")
    parser.add_argument("--after", type=Path, help="a file of results, whose rows are kept")
    parser.add_argument("--budget-s", type=float, default=240, help="starts no row after it")
    options = parser.parse_args()
    model, shape, rates, done = None, None, None, []
    if options.after:
        found = json.loads(options.after.read_text(encoding="utf-8"))
        rates, done = roofline.Rates(**found["rates"]), found["rows"]
    names = [field.name for field in dataclasses.fields(Row)]
    there = [Row(**{name: row[name] for name in names}) for row in done]
    for row in rows():
        fits = options.most_tokens >= row.tokens and options.most_K >= row.K
        if row.shape not in options.shapes or not fits or row in there:
            continue
        if time.monotonic() - began > options.budget_s:
            print("the budget is used up: the rows that follow are left out")
            break
        if row.shape != shape:
            model = None  # before the next takes its place
            model, shape = build(row.shape, options), row.shape
        if rates is None:
            n = 8192 if cuda else 1024
            dtype = getattr(torch, options.dtype)
            rates = roofline.measured(tiny_step(model, options), options.device, dtype, n)
            print(rates)
        done.append(measure(model, row, options))
        gc.collect()
        shown = done[-1].get("error", "{over base:.2f}, +{mebibytes over base:,.0f} MiB")
        print(*vars(row).values(), "|", shown.format_map(done[-1]), flush=True)
        write("scaling", done, settings={**vars(options), "after": None}, rates=vars(rates))


if __name__ == "__main__":
    main()
