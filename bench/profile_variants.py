"""Kernels that one step of a population of 16 launches on a GPU, by variant, and their run time.

population.py measures the wall time of such a step. `python bench/profile_variants.py`
"""

from __future__ import annotations

import argparse

import torch
from common import of_rank, qwen3, write
from population import Setting
from torch.profiler import ProfilerActivity, profile


def main() -> None:
    r, layers, tokens = 32, 28, 256
    model = qwen3(layers, "cuda", torch.bfloat16)
    options = argparse.Namespace(tokens=tokens, device="cuda")
    rows = []
    for name in ("lora", "dora", "delora", "ia3", "hra"):
        setting = Setting(model, of_rank(name, r), 16, 1, options)
        setting.population()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            setting.population()
            torch.cuda.synchronize()
        events = profiled.key_averages()
        launches = [e.count for e in events if e.key.startswith(("cudaLaunch", "cuLaunchKernel"))]
        kernels = [event for event in events if event.device_type.name == "CUDA"]
        rows.append(
            {
                "variant": name,
                "launches": sum(launches),
                "milliseconds": sum(event.self_device_time_total for event in kernels) / 1e3,
                "profiler": events.table(sort_by="self_device_time_total", row_limit=14),
            }
        )
    settings = {"K": 16, "examples": 1, "layers": layers, "tokens": tokens, "r": r}
    write("profile", rows, settings={**settings, "dtype": "bfloat16"})


if __name__ == "__main__":
    main()
