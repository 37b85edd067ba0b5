"""What an adapter costs on a base that `fully_shard` spreads over the GPUs of one machine.

Each GPU runs the step of scaling.py on tokens of its own: once with a whole copy of the base, once
with its shard, all interleaved. The prediction for a model that fits on no single GPU is that the
adapter's time over the base, and its memory, are the same in both; the gathering of the weights
costs base and adapter alike. The gradients of the adapter are not averaged: that is the training
loop's, and the same for all.

    torchrun --nproc-per-node 2 bench/sharded.py
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

import scaling
import speed
import torch
import torch.distributed as dist
from common import interleaved, peak, ratio, repeated, write
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

ROWS = [
    scaling.Row("8B", name, tokens)
    for tokens in (2048, 4096, 16384)
    for name in ("lora", "dora")
]  # fmt: skip


def sharded(model: Any, device: str) -> Any:
    """The model, with each block and the rest as a group of shards."""
    mesh = init_device_mesh(device.partition(":")[0], (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def measure(models: dict[str, Any], row: scaling.Row, options: argparse.Namespace) -> Any:
    """Times and memory of this rank. All ranks measure together."""
    steps = {}
    for where, model in models.items():
        runs = scaling.forwards(model, row, getattr(torch, options.dtype))
        for who, (forward, wanted) in runs.items():
            steps[f"{who}, {where}"] = speed.stepped(forward, wanted)
    loops = {who: repeated(step, options.in_a_row) for who, step in steps.items()}
    times = interleaved(loops, options.rounds, warmup=1)
    times = {who: [t / options.in_a_row for t in own] for who, own in times.items()}
    peaks = {who: peak(step) / 2**20 for who, step in steps.items()}
    return {
        **vars(row),
        "layers": len(models["whole"].model.layers),
        "GPUs": dist.get_world_size(),
        "milliseconds": {who: 1e3 * statistics.median(ts) for who, ts in times.items()},
        "over base": {where: ratio(times, f"ours, {where}", f"base, {where}") for where in models},
        "mebibytes over base": {
            where: peaks[f"ours, {where}"] - peaks[f"base, {where}"] for where in models
        },
        "seconds of each round": times,
    }


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--most-layers", type=int, default=8 if cuda else 2)
    parser.add_argument("--most-tokens", type=int, default=16384 if cuda else 2048)
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--toy", action="store_true", help="tiny widths, to try the script")
    parser.add_argument("--rounds", type=int, default=5 if cuda else 3)
    parser.add_argument("--in-a-row", type=int, default=4 if cuda else 1, help="steps of a round")
    options = parser.parse_args()
    options.device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(options.device)
    dist.init_process_group("nccl" if cuda else "gloo")
    row = speed.Row("8B", options.most_layers, 1, 1, "eager", "lora", "")
    models = {"whole": speed.build(row, options), "sharded": speed.build(row, options)}
    models["sharded"] = sharded(models["sharded"], options.device)
    done = []
    for row in ROWS:
        if row.tokens > options.most_tokens:
            continue
        done.append(measure(models, row, options))
        if dist.get_rank() == 0:
            print(row, done[-1]["milliseconds"], done[-1]["over base"], flush=True)
            print(done[-1]["mebibytes over base"], flush=True)
            write("sharded", done, settings=vars(options))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
