"""What a training step asks of the GPU: kernels, and the time for which they run.

The steps are those of `speed.py`, on few layers. `cpu` is the time
until the CPU has asked for all kernels, and `wall` that until they are done: where both are equal,
the GPU waits.
`python bench/profile_steps.py --help`
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from common import commit, write
from speed import Contenders, Row
from torch.profiler import ProfilerActivity, profile

ROWS = [
    *(Row("8B", 8, 2, 2048, "eager", name, "all linear") for name in ("lora", "dora")),
    Row("8B", 8, 2, 2048, "eager", "hra", "q, v"),
    Row("0.6B", 28, 4, 512, "eager", "lora", "q, v"),
    *(Row("0.6B", 28, 4, 512, "eager", name, "all linear") for name in ("lora", "dora")),
    *(Row("8B", 8, 2, 2048, "nf4", name, "all linear") for name in ("lora", "dora")),
    *(Row("8B", 8, 4, 2048, "checkpointing", name, "all linear") for name in ("lora", "dora")),
    Row("8B", 8, 2, 2048, "compiled", "lora", "all linear"),
]
LONGEST = 16


def kernels(step: Callable[[], Any], times: int = 3) -> dict[str, Any]:
    """Their number and milliseconds in a step, and those that run longest."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(times):
            step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in profiler.events() or []:
        if event.device_type.name == "CUDA":
            found[event.name][0] += 1 / times
            found[event.name][1] += event.device_time / 1e3 / times
    longest = sorted(found, key=lambda name: -found[name][1])[:LONGEST]
    return {
        "kernels": round(sum(n for n, _ in found.values())),
        "milliseconds": sum(ms for _, ms in found.values()),
        "longest": [{"name": n, "kernels": found[n][0], "ms": found[n][1]} for n in longest],
    }


def clocked(step: Callable[[], Any], times: int = 10) -> dict[str, float]:
    """Milliseconds until the CPU, and until the GPU is done."""
    cpu, wall = [], []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        cpu.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        wall.append(1e3 * (time.perf_counter() - start))
    return {"cpu": statistics.median(cpu), "wall": statistics.median(wall)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--ways", nargs="*", default=list(dict.fromkeys(row.way for row in ROWS)))
    given = vars(parser.parse_args())
    common = {"device": "cuda", "dtype": "bfloat16", "toy": False, "peft": False}
    options = argparse.Namespace(**common, **given, most_layers=32, most_tokens=2048)
    rows: list[dict[str, Any]] = []
    for row in ROWS:
        if row.way not in options.ways:
            continue
        for who, step in Contenders(row, options).steps().items():
            if "torch.func.grad" in who and row.way == "compiled":  # fails on torch 2.11
                continue
            for _ in range(3):
                step()
            about = {**vars(row), "who": who, "commit": commit()}
            rows.append({**about, **kernels(step), **clocked(step)})
            print({k: v for k, v in rows[-1].items() if k != "longest"}, flush=True)
            write("kernels", rows, settings=vars(options))


if __name__ == "__main__":
    main()
