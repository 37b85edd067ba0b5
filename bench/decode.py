"""What a decoded token costs through a bound view, over a token of the base model.

Of one sequence, of several with one adapter, and of several with an adapter each. A model of 12
layers in the shape of Qwen3, one thread: a token's kernels are too small to share. Every contender
has a cache of its own, filled with one prompt. A step runs one token through the model and takes it
off the cache again, so all steps cost the same. The clock is that of the process.
`python bench/decode.py --help`
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, qwen3, ratio, write
from overhead import LINEAR, Q_V
from torch import nn
from transformers import DynamicCache

import lora_func as lf

CASES = ((1, 1), (8, 1), (8, 8))
"""Sequences, and adapters."""
SIZES = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def variants(r: int) -> dict[str, lf.Variant]:
    return {
        "lora": lf.LoRA(r=r),
        "dora": lf.DoRA(r=r),
        "hra": lf.HRA(r=r),
        "oft": lf.OFT(block_size=32),
    }


def decoding(model: Any, prompt: torch.Tensor) -> Callable[[], Any]:
    """A step of `model` that decodes one token after the prompt."""
    cache, token = DynamicCache(config=model.config), prompt[:, -1:]
    model(prompt, past_key_values=cache)

    def step() -> None:
        model(token, past_key_values=cache)
        cache.crop(-1)

    return step


def bound(
    model: nn.Module, variant: lf.Variant, names: list[str], adapters: int
) -> tuple[nn.Module, int]:
    """A view of `model` with adapters that were trained a little, and the number of its layers."""
    targets = lf.Targets(names=tuple(rf"\.{name}$" for name in names), roles=())
    adapter, params = lf.adapt(model, variant, targets=targets)
    trained = [
        {key: leaf + 0.01 * torch.randn_like(leaf) for key, leaf in params.items()}
        for _ in range(adapters)
    ]
    params = lf.stack(trained) if adapters > 1 else trained[0]
    return lf.bind(adapter, model, params), len(adapter.targets)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the decoded one")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = qwen3(options.layers, "cpu", torch.float32, **SIZES)
    rows = []
    cases = itertools.product((("q, v", Q_V), ("all linear", LINEAR)), CASES)
    for (targets, names), (batch, adapters) in cases:
        prompt = torch.randint(SIZES["vocab_size"], (batch, options.prompt))
        views = {
            name: bound(model, variant, names, adapters)
            for name, variant in variants(options.r).items()
        }
        steps = {"base": decoding(model, prompt)}
        steps |= {name: decoding(view, prompt) for name, (view, _) in views.items()}
        times = interleaved(steps, options.rounds, warmup=5, clock=time.process_time)
        for name, (_, layers) in views.items():
            rows.append(
                {
                    "variant": name,
                    "targets": targets,
                    "layers": layers,
                    "batch": batch,
                    "adapters": adapters,
                    "milliseconds": 1e3 * statistics.median(times[name]),
                    "base, milliseconds": 1e3 * statistics.median(times["base"]),
                    "time over base": ratio(times, name, "base"),
                }
            )
            print(
                f"{name:6s} {targets:12s} batch {batch}, adapters {adapters}: "
                f"{rows[-1]['time over base']:.2f} times the base's token"
            )
    write("decode", rows, settings=vars(options))


if __name__ == "__main__":
    main()
