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
from common import interleaved, peak_bytes, qwen3, ratio, write

import lora_func as lf

Q_V = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = "of the Qwen3-0.6B shape"


def contenders(r: int) -> dict[str, tuple[lf.Variant, peft.PeftConfig, list[str]]]:
    """name -> (variant, PEFT's config of the same method, names of the targets)."""
    pissa: Any = "pissa_niter_4"  # a number in the place that PEFT's annotation leaves open
    return {
        "lora": (lf.LoRA(r=r), peft.LoraConfig(r=r, target_modules=Q_V), Q_V),
        "lora, all linear": (lf.LoRA(r=r), peft.LoraConfig(r=r, target_modules=LINEAR), LINEAR),
        "pissa": (
            lf.PiSSA(r=r),
            peft.LoraConfig(r=r, init_lora_weights=pissa, target_modules=Q_V),
            Q_V,
        ),
        "dora": (lf.DoRA(r=r), peft.LoraConfig(r=r, use_dora=True, target_modules=Q_V), Q_V),
        "delora": (lf.DeLoRA(r=r), peft.DeloraConfig(r=r, target_modules=Q_V), Q_V),
        "ia3": (lf.IA3(), peft.IA3Config(target_modules=Q_V, feedforward_modules=[]), Q_V),
        "ia3ff": (
            lf.IA3FF(),
            peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
            ["down_proj"],
        ),
        "hra": (lf.HRA(r=r), peft.HRAConfig(r=r, target_modules=Q_V), Q_V),
    }


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    variant, config, names = contenders(options.r)[name]
    dtype = getattr(torch, options.dtype)
    model = qwen3(options.layers, options.device, dtype)
    targets = lf.Targets(names=tuple(rf"\.{target}$" for target in names), roles=())
    adapter, params = lf.adapt(model, variant, targets=targets)
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
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
    parser.add_argument("--variants", nargs="*", default=list(contenders(8)), help="default: all")
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
