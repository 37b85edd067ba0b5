"""What a step should cost, from what its kernels compute and move: a roofline model.

The step runs on the device "meta", as in the calculator. Each kernel takes

    max(floating-point operations / peak rate, bytes / bandwidth)

and each operation, views included, keeps the CPU busy for a while. The GPU works meanwhile, so a
step takes as long as all kernels or as all operations, whichever is longer. The four constants are
measured on the device (see `measured`), and nothing is fitted. Memory is the calculator's peak.

In short: for a layer `[o, i]`, N tokens and rank r, the base computes 4 N i o operations, and LoRA
adds 6 N r (i + o) of them. At a small r, it is its passes over `[N, i]` and `[N, o]` that take
time, and with few tokens its operations on the CPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import interleaved
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lora_func.calculator import Live
from lora_func.libraries.cuda_kernels import AsOnCUDA, asks_about_data


@dataclass(frozen=True)
class Rates:
    """What a device can do."""

    flops: float
    """Floating-point operations a second, of one large product of matrices."""
    bandwidth: float
    """Bytes a second, read and written by one large copy."""
    narrow: float
    """Bytes a second, read and written by products with a narrow matrix, as those of LoRA."""
    launch: float
    """Seconds for which the CPU is busy with an operation."""


@dataclass
class Work:
    """What a step computes and moves, and what it takes."""

    operations: int = 0
    """Of all kinds. Those without a kernel, such as views, keep the CPU busy, too."""
    flops: float = 0
    moved: float = 0
    """Bytes, read and written."""
    gpu: float = 0
    """Seconds of all kernels."""
    peak: int = 0
    """The most bytes that are alive at a time."""

    def seconds(self, rates: Rates) -> float:
        """Of a step."""
        return max(self.gpu, self.operations * rates.launch)


class Counting(TorchDispatchMode):
    """Adds up the work of all operations within it."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates, self.work = rates, Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if asks_about_data(func, args):
            return True
        out = func(*args, **(kwargs or {}))
        self.work.operations += 1
        read, made = sizes((args, kwargs)), sizes(out)
        if "empty" not in func.__name__ and (func._schema.is_mutable or made.keys() - read.keys()):
            flops, moved = flops_of(func, args, kwargs, out), sum([*read.values(), *made.values()])
            self.work.flops += flops
            self.work.moved += moved
            bandwidth = self.rates.narrow if flops else self.rates.bandwidth
            self.work.gpu += max(flops / self.rates.flops, moved / bandwidth)
        return out


def sizes(tree: Any) -> dict[int, int]:
    """The bytes of each tensor in a tree: of what it spans, if it is expanded."""
    found = {}
    for t in pytree.tree_leaves(tree):
        if isinstance(t, Tensor):
            storage = t.untyped_storage()
            found[storage._cdata] = min(t.nbytes, storage.nbytes())
    return found


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """The floating-point operations of products and attention; bytes limit all other kernels."""
    name = func._overloadpacket.__name__.removesuffix("_")  # in place as well
    if "attention" in name and "dot_product" in name:
        return attention_flops(args, "backward" in name)
    formula = flop_registry.get(getattr(torch.ops.aten, name, None))
    if formula is None:
        return 0.0
    return formula(*args, **(kwargs or {}), out_val=out)


def attention_flops(args: Any, backward: bool) -> float:
    """Of scaled dot products, half of them if causal. Backward has five products, forward two.

    PyTorch 2.11's own formula refuses queries with more heads than the keys have.
    """
    q, k, v = args[1:4] if backward else args[:3]
    one = 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]) / 2
    causal = any(each is True for each in args)
    return (5 if backward else 2) * one / (2 if causal else 1)


def predicted(
    forward: Callable[[], Tensor],
    wanted: Sequence[Tensor],
    rates: Rates,
    toward: Tensor | None = None,
) -> Work:
    """The work of a forward and a backward to `wanted`, on the device "meta"."""
    with Live() as live, Counting(rates) as counting, AsOnCUDA():
        torch.autograd.grad(forward(), wanted, toward, allow_unused=True)
    counting.work.peak = live.peak
    return counting.work


def measured(
    tiny: Callable[[], Any], device: str, dtype: torch.dtype, n: int, r: int = 32
) -> Rates:
    """The rates of a device. `tiny`: a step whose kernels take no time."""
    x, W = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    A, h = (torch.randn(shape, device=device, dtype=dtype) for shape in ((r, n), (n, r)))
    ways = {
        "product": lambda: x @ W,
        "copy": lambda: W.copy_(x),
        "narrow": lambda: (x @ A.mT, h @ A, h.mT @ x),
        "tiny": tiny,
    }
    seconds = {way: statistics.median(ts) for way, ts in interleaved(ways, rounds=9).items()}
    with Counting(Rates(1.0, 1.0, 1.0, 1.0)) as counting:
        tiny()
    return Rates(
        flops=2 * n**3 / seconds["product"],
        bandwidth=2 * x.nbytes / seconds["copy"],
        narrow=3 * (x.nbytes + 2 * A.nbytes) / seconds["narrow"],
        launch=seconds["tiny"] / counting.work.operations,
    )
