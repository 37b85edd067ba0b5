"""What a decoded token costs through a bound view, over a token of the base model.

Of one sequence, of several with one adapter, and of several with an adapter each. On the CPU, a
model of 12 layers in the shape of Qwen3, one thread: a token's kernels are too small to share. The
clock is that of the process. On a GPU, the shape of Qwen3-0.6B in bfloat16, eager and captured.

Every contender has a cache of its own, filled with one prompt. A step runs one token through the
model. Eager, it takes the token off the cache again, so all steps cost the same. Captured by
`lf.capture`, it writes to a cache of a fixed size, all of which each step reads.
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
from transformers import DynamicCache, StaticCache

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


def captured(model: Any, prompt: torch.Tensor, steps: int) -> Callable[[], Any]:
    """The same as a CUDA graph, for so many tokens at most."""
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + steps)
    model(prompt, past_key_values=cache)
    batch = {"input_ids": prompt[:, -1:]}
    step = lf.capture(lambda batch: model(**batch, past_key_values=cache).logits, batch)
    return lambda: step(batch)


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
    cuda = torch.cuda.is_available()
    parser.add_argument("--layers", type=int, default=28 if cuda else 12)
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the decoded one")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    model = qwen3(options.layers, device, dtype, **({} if cuda else SIZES))
    clock = time.perf_counter if cuda else time.process_time
    rows = []
    cases = itertools.product((("q, v", Q_V), ("all linear", LINEAR)), CASES)
    for (targets, names), (batch, adapters) in cases:
        prompt = torch.randint(SIZES["vocab_size"], (batch, options.prompt), device=device)
        views = {
            name: bound(model, variant, names, adapters)
            for name, variant in variants(options.r).items()
        }
        steps = {"base": decoding(model, prompt)}
        steps |= {name: decoding(view, prompt) for name, (view, _) in views.items()}
        if cuda:
            models = {"base": model, **{name: view for name, (view, _) in views.items()}}
            most = options.rounds + 10
            steps |= {f"{name}, captured": captured(m, prompt, most) for name, m in models.items()}
        times = interleaved(steps, options.rounds, warmup=5, clock=clock)
        for name, (_, layers) in views.items():
            graph = {}
            if cuda:
                of, to = f"{name}, captured", "base, captured"
                graph = {
                    "captured, milliseconds": 1e3 * statistics.median(times[of]),
                    "base, captured, milliseconds": 1e3 * statistics.median(times[to]),
                    "captured over captured base": ratio(times, of, to),
                }
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
                    **graph,
                }
            )
            shown = [x for key, x in rows[-1].items() if "over" in key]
            print(
                f"{name:6s} {targets:12s} batch {batch}, adapters {adapters}: "
                f"{', captured '.join(f'{x:.2f}' for x in shown)} times the base's token",
                flush=True,
            )
    write("decode", rows, settings=vars(options))


if __name__ == "__main__":
    main()
