"""What one rank of DistributedDataParallel does, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from toys import ROWS, adapted, batches, copies

import lora_func as lf


def train_one_rank(rank: int, folder: str, variants: list[lf.Variant]) -> None:
    """Writes to `folder`, for each variant, the gradients of each step and the leaves at last."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = []
    for variant in variants:
        model, adapter, params = adapted(variant)
        module = DistributedDataParallel(lf.bind(adapter, model, params))
        optimizer, grads = torch.optim.SGD(params.values(), lr=1.0), []
        for batch in batches():
            optimizer.zero_grad()
            half = {key: rows.split(ROWS // 2)[rank] for key, rows in batch.items()}
            module(**half).loss.backward()
            grads.append({key: leaf.grad.clone() for key, leaf in params.items()})  # pyright: ignore
            optimizer.step()
        results.append((grads, copies(params)))
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
