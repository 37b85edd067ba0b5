"""The time and memory of a training step, over the frozen base and beside PEFT's same method.

A step is a forward and a backward to the input embeddings (the base's whole work), and to the
adapter if there is one. All contenders of a variant run interleaved in one process.
`python bench/overhead.py --help`
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import peft
import torch
from common import interleaved, of_rank, peak_bytes, peft_config, qwen3, ratio, write

import lora_func as lf

Q_V = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = "of the Qwen3-0.6B shape"


NAMES = ("lora", "lora, all linear", "pissa", "dora", "delora", "ia3", "ia3ff", "hra")
"""Of the catalogue; PEFT has them all."""


def contender(name: str, r: int) -> tuple[lf.Variant, list[str]]:
    """The variant of this name, and the names of its targets."""
    variant = of_rank(name.partition(",")[0], r)
    if name.endswith("all linear"):
        return variant, LINEAR
    return variant, [pattern.rstrip("$") for pattern in variant.card.layers]


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    variant, names = contender(name, options.r)
    dtype = getattr(torch, options.dtype)
    model = qwen3(options.layers, options.device, dtype)
    targets = lf.Targets(names=tuple(rf"\.{target}$" for target in names), roles=())
    adapter, params = lf.adapt(model, variant, targets=targets)
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    config = peft_config(variant, names)
    theirs = peft.get_peft_model(qwen3(options.layers, options.device, dtype), config)
    size = (options.batch, options.tokens, 1024)
    embeds = 0.02 * torch.randn(size, device=options.device, dtype=dtype)
    batch = {"inputs_embeds": embeds.requires_grad_(), "use_cache": False, "logits_to_keep": 1}

    def step(call) -> None:
        out = call().logits.float().square().mean()
        out.backward()
        embeds.grad = None
        for leaf in leaves.values():
            leaf.grad = None
        theirs.zero_grad()

    steps = {
        "base": lambda: step(lambda: model(**batch)),
        "ours": lambda: step(lambda: adapter(model, leaves, batch)),
        "peft": lambda: step(lambda: theirs(**batch)),
    }
    times = interleaved(steps, options.rounds, warmup=3)
    peaks = {who: peak_bytes(run) for who, run in steps.items()}
    return {
        "variant": name,
        "targets": len(adapter.targets),
        "milliseconds": {who: 1e3 * statistics.median(ts) for who, ts in times.items()},
        "time over base": {who: ratio(times, who, "base") for who in ("ours", "peft")},
        "time over peft": ratio(times, "ours", "peft"),
        "mebibytes": {who: size / 2**20 for who, size in peaks.items()},
        "seconds of each round": times,
    }


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="*", default=NAMES, help="default: all")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--layers", type=int, default=28 if cuda else 4, help=LAYERS)
    parser.add_argument("--batch", type=int, default=4 if cuda else 2)
    parser.add_argument("--tokens", type=int, default=512 if cuda else 128)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20 if cuda else 9)
    options = parser.parse_args()
    rows = []
    for name in options.variants:
        rows.append(measure(name, options))
        row = rows[-1]
        over_base = ", ".join(f"{who} {x:.2f}" for who, x in row["time over base"].items())
        memory = ", ".join(f"{who} {size:.0f}" for who, size in row["mebibytes"].items())
        print(
            f"{name:18s} over the base: {over_base};  "
            f"ours over peft {row['time over peft']:.2f};  MiB: {memory}",
            flush=True,
        )
    write("overhead", rows, settings=vars(options))


if __name__ == "__main__":
    main()
