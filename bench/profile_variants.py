"""What a population of 16 costs on a GPU, by variant: kernels launched, and the time for which they run, of one step.

Beside population.py, whose times are those of the wall. `python bench/profile_variants.py`
"""

from __future__ import annotations

import argparse

import torch
from common import qwen3, write
from population import Setting
from torch.profiler import ProfilerActivity, profile

import lora_func as lf


def main() -> None:
    settings = {"K": 16, "examples": 1, "layers": 28, "tokens": 256, "dtype": "bfloat16", "r": 32}
    r = settings["r"]
    variants = {
        "lora": lf.LoRA(r=r),
        "dora": lf.DoRA(r=r),
        "delora": lf.DeLoRA(r=r),
        "ia3": lf.IA3(),
        "hra": lf.HRA(r=r),
    }
    model = qwen3(settings["layers"], "cuda", torch.bfloat16)
    rows = []
    for name, variant in variants.items():
        setting = Setting(
            model, variant, 16, 1, argparse.Namespace(tokens=settings["tokens"], device="cuda")
        )
        setting.population()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            setting.population()
            torch.cuda.synchronize()
        events = profiled.key_averages()
        launches = sum(
            event.count
            for event in events
            if event.key.startswith(("cudaLaunch", "cuLaunchKernel"))
        )
        kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        rows.append(
            {
                "variant": name,
                "launches": launches,
                "milliseconds": sum(event.self_device_time_total for event in kernels) / 1e3,
                "profiler": events.table(sort_by="self_device_time_total", row_limit=14),
            }
        )
    write("profile", rows, settings=settings)


if __name__ == "__main__":
    main()
