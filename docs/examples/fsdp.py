"""Train an adapter of a model that is too large for one GPU.

FSDP2 shards the base; the adapter is replicated. A tiny Llama, with gloo on
the CPU:

    torchrun --nproc-per-node 2 fsdp.py

78e9 random weights, with NCCL on two GPUs:

    torchrun --nproc-per-node 2 fsdp.py \\
        --hidden 8192 --layers 80 --dtype bfloat16
"""

import argparse
import os
import resource

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import lora_func as lf

parser = argparse.ArgumentParser()
VARIANTS = ["LoRA", "DoRA", "PiSSA", "DeLoRA", "IA3", "HRA"]
DTYPES = ["float32", "bfloat16"]  # of the base
parser.add_argument("--variant", default="LoRA", choices=VARIANTS)
parser.add_argument("--hidden", type=int, default=64, help="a multiple of 64")
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--dtype", default="float32", choices=DTYPES)
parser.add_argument("--batch", type=int, default=4, help="sequences of a rank")
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--lr", type=float, default=1e-2)
options = parser.parse_args()

device = torch.device("cpu")
if cuda := torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
backend, own = ("nccl", device) if cuda else ("gloo", None)
dist.init_process_group(backend, device_id=own)
rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh(device.type, (ranks,))
torch.manual_seed(0)  # all ranks draw the same base and the same adapter

config = LlamaConfig(
    vocab_size=128,
    hidden_size=options.hidden,
    intermediate_size=7 * options.hidden // 2,
    num_hidden_layers=options.layers,
    num_attention_heads=options.hidden
    // (32 if options.hidden < 4096 else 128),
)
config.dtype = getattr(torch, options.dtype)
with torch.device("meta"):  # nothing is allocated
    model = LlamaForCausalLM._from_config(config)
model.requires_grad_(False)  # frozen before it is sharded
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
model.to_empty(device=device)  # the shards of this rank
model.init_weights()  # or load a checkpoint: torch.distributed.checkpoint

adapted_forward, params = lf.adapt(model, getattr(lf, options.variant)())
leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
optimizer = torch.optim.AdamW(leaves.values(), lr=options.lr)
data = torch.Generator().manual_seed(rank)  # each rank has data of its own
losses = []
for step in range(options.steps):
    size = (options.batch, 1)
    starts = torch.randint(config.vocab_size, size, generator=data)
    counting = (starts + torch.arange(options.length)) % config.vocab_size
    ids = counting.to(device)
    batch = {"input_ids": ids, "labels": ids}
    loss = adapted_forward(model, leaves, batch).loss
    optimizer.zero_grad()
    loss.backward()
    grads = [leaf.grad for leaf in leaves.values()]
    for tensor in (loss.detach_(), *grads):  # mean over ranks
        dist.all_reduce(tensor)
        tensor.div_(ranks)
    optimizer.step()
    losses.append(loss.item())
    if rank == 0:
        print(f"step {step + 1}: loss {losses[-1]:.3f}", flush=True)

MiB = 2**20
if cuda:
    peak = torch.cuda.max_memory_allocated() / MiB
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MiB
shards = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
held = sum(t.nbytes for t in shards) / MiB
whole = sum(t.nbytes for t in model.parameters()) / MiB
holds = f"holds {held:,.1f} of the base's {whole:,.1f} MiB"
print(f"rank {rank}: {holds}, peak {peak:,.0f} MiB", flush=True)
assert losses[-1] < losses[0]
dist.destroy_process_group()
