"""Peak memory of the step of lora-lite's benchmark, measured and counted by the calculator.

LoRA with r=32 on q and v of Qwen3-0.6B's shape, 4 sequences of 768 tokens, bfloat16, AdamW: the
setting for which lora-lite reports 11.3 GB. `python bench/seed.py`
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import qwen3, synchronize, write
from torch import Tensor

import lora_func as lf
from lora_func.calculator import calculate

VARIANTS = ("lora", "pissa", "dora", "delora", "hra", "ia3", "antipasto")
"""Rows of lora-lite's table. EVA trains what LoRA trains."""


def measured(model: Any, adapter: lf.Adapter, params: dict[str, Tensor], batch: Any) -> int:
    """Bytes at the peak of three steps of training."""
    leaves = {key: leaf.detach().clone().requires_grad_() for key, leaf in params.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=1e-4)
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        adapter(model, leaves, batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--r", type=int, default=32)
    options = parser.parse_args()
    real, meta = (qwen3(options.layers, device, torch.bfloat16) for device in ("cuda", "meta"))
    rows: list[dict[str, Any]] = []
    for name in options.variants:
        variant = lf.Card.suggested(lf.VARIANTS[name], options.r)
        targets = lf.Targets(names=variant.card.layers)
        adapter, params = lf.adapt(real, variant, targets=targets)
        ids = torch.randint(1000, (options.batch, options.tokens))
        batch = {"input_ids": ids, "labels": ids, "use_cache": False}
        on_gpu = {key: t.cuda() if isinstance(t, Tensor) else t for key, t in batch.items()}
        peak = measured(real, adapter, params, on_gpu)
        counted, shapes = lf.adapt(meta, variant, targets=targets)
        empty = {key: t.to("meta") if isinstance(t, Tensor) else t for key, t in batch.items()}
        total = calculate(counted, meta, shapes, empty).total
        parameters = sum(leaf.numel() for leaf in params.values())
        rows.append({"variant": name, "parameters": parameters, "bytes": peak, "counted": total})
        print(rows[-1], flush=True)
        del adapter, params
    write("seed", rows, settings=vars(options))


if __name__ == "__main__":
    main()
