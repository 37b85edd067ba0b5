"""Milliseconds of a call before any arithmetic: building a view of 28 layers, 56 targets.

The model has the modules of Qwen3-0.6B and tiny widths, so that its forward is little more than
Python. The step `functional_call` is that of torch.func on a bound view. `python bench/view.py`
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import interleaved, qwen3, write
from overhead import Q_V
from torch.func import functional_call

import lora_func as lf

WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def main() -> None:
    frozen = qwen3(28, "cpu", torch.float32, **WIDTHS, head_dim=8)
    trainable = qwen3(28, "cpu", torch.float32, **WIDTHS, head_dim=8).requires_grad_(True)
    targets = lf.Targets(names=tuple(rf"\.{name}$" for name in Q_V), roles=())
    adapter, params = lf.adapt(frozen, lf.LoRA(r=2), targets=targets)
    ids = torch.randint(64, (1, 4))
    bound = lf.bind(adapter, frozen, params)
    batch = {"input_ids": ids, "use_cache": False}
    steps: dict[str, Any] = {
        "view of a frozen base": lambda: adapter.view(frozen, params, call=True),
        "view of a base that requires grad": lambda: adapter.view(trainable, params, call=True),
        "bind": lambda: lf.bind(adapter, frozen, params),
        "forward of the base": lambda: frozen(**batch),
        "forward of a bound view": lambda: bound(**batch),
        "forward, adapted": lambda: adapter(frozen, params, batch),
        "forward by functional_call": lambda: functional_call(bound, params, (), batch),
    }
    with torch.no_grad():
        times = interleaved(steps, rounds=50, warmup=5)
    rows = [
        {"step": name, "milliseconds": 1e3 * statistics.median(seconds)}
        for name, seconds in times.items()
    ]
    for row in rows:
        print(f"{row['step']:36s} {row['milliseconds']:.2f} ms")
    write("view", rows, settings={"layers": 28, "targets": len(adapter.targets), "rounds": 50})


if __name__ == "__main__":
    main()
