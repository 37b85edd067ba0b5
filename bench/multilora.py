"""One linear layer with K LoRAs on one batch, beside the grouped products of a training server.

prime-rl trains the LoRAs of many runs at once. Its `MultiLoRALinear` takes a row of tokens, sorted
by adapter, and the number of tokens of each; it stacks the K pairs of factors in each forward and
multiplies by torch's grouped product. A step is a forward and a backward to the factors of all and
to the input. Shapes are those of a layer of an 8B model: 4096 tokens of width 4096, r=16.

    base         the frozen layer alone, backward to the input
    grouped      the same computation as MultiLoRALinear, by `F.grouped_mm`
    prime-rl     MultiLoRALinear itself, if prime-rl is installed
    select       the adapted layer, with the factors gathered for each example: unequal numbers
    each         the adapted layer, with equal numbers of examples for the adapters: no gather
    bound        the same as a bound view, whose leaves are stacked once

All but the last two have unequal numbers of tokens for the adapters. The captured times are those
of a CUDA graph of the step: the kernels without the launches. `python bench/multilora.py --help`
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved, peak_bytes, ratio, replayed, write
from torch import Tensor, nn

import lora_func as lf

ALPHA = 32.0


def unequal(examples: int, K: int) -> Tensor:
    """How many of the examples each adapter has: at least one, and the first the most."""
    weights = 1 / torch.arange(1, K + 1)
    counts = 1 + (weights / weights.sum() * (examples - K)).floor().long()
    counts[0] += examples - counts.sum()
    return counts


class Setting:
    """A layer, K pairs of factors as if trained, and a batch of examples sorted by adapter."""

    def __init__(self, K: int, length: int, options: argparse.Namespace):
        torch.manual_seed(0)
        device, dtype = options.device, getattr(torch, options.dtype)
        self.K, self.n, self.r = K, options.tokens // length, options.r
        layer = nn.Linear(options.width, options.width, bias=False, device=device, dtype=dtype)
        self.model = nn.Sequential(layer.requires_grad_(False))
        variant = lf.LoRA(r=options.r, alpha=ALPHA)
        self.adapter, params = lf.adapt(self.model, variant, targets=lf.Targets(roles=()))
        self.members = [
            {
                key: (leaf + 0.01 * torch.randn_like(leaf)).to(dtype).requires_grad_()
                for key, leaf in params.items()
            }
            for _ in range(K)
        ]
        self.leaves = [leaf for member in self.members for leaf in member.values()]
        self.stacked = {
            key: leaf.detach().requires_grad_() for key, leaf in lf.stack(self.members).items()
        }
        shape = self.n, length, options.width
        self.x = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        self.slope = torch.randn(shape, device=device, dtype=dtype)
        self.counts = unequal(self.n, K).to(device)
        self.tokens = (self.counts * length).to(torch.int32)
        self.offsets = self.tokens.cumsum(0, dtype=torch.int32)
        owner = torch.arange(K, device=device)
        self.ids = owner.repeat_interleave(self.counts)
        scales = torch.full((K,), ALPHA / self.r, device=device, dtype=dtype)
        self.scales = scales.repeat_interleave(self.tokens)[:, None]
        self.module = lf.bind(self.adapter, self.model, self.stacked, each=self.n // K)

    def grouped(self) -> Tensor:
        """By the grouped product: tokens `[N, d]`, factors stacked anew."""
        rows = self.x.flatten(0, 1)
        A = torch.stack([member["0.lora_A"] for member in self.members])  # [K, r, d_in]
        B = torch.stack([member["0.lora_B"] for member in self.members])  # [K, d_out, r]
        h = F.grouped_mm(rows, A.mT, offs=self.offsets)
        update = F.grouped_mm(h, B.mT, offs=self.offsets)
        return (self.model(rows) + self.scales * update).view_as(self.x)

    def select(self) -> Tensor:
        """An entry for each example."""
        return self.adapter(self.model, lf.select(lf.stack(self.members), self.ids), self.x)

    def each(self) -> Tensor:
        """An entry for each adapter, and equal numbers of examples."""
        return self.adapter(self.model, lf.stack(self.members), self.x, each=self.n // self.K)

    def bound(self) -> Tensor:
        """The same through a view that is made once."""
        return self.module(self.x)

    def steps(self, prime_rl: Any) -> dict[str, Callable[[], Any]]:
        """A step of each contender. `prime_rl`: its module of LoRA layers, or None."""

        def step(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(forward(), [*leaves, self.x], self.slope)

        steps = {
            "base": step(lambda: self.model(self.x), []),
            "grouped": step(self.grouped, self.leaves),
            "select": step(self.select, self.leaves),
            "each": step(self.each, self.leaves),
            "bound": step(self.bound, list(self.stacked.values())),
        }
        if prime_rl is not None:
            theirs = self.theirs(prime_rl)
            leaves = [*theirs.lora_A, *theirs.lora_B]
            steps["prime-rl"] = step(lambda: theirs(self.x), leaves)
        return steps

    def theirs(self, prime_rl: Any) -> Any:
        """prime-rl's layer with the same factors."""
        # Its globals do not let the number of adapters change.
        prime_rl.base.LORA_NUM_TOKENS = prime_rl.base.SCALING_FACTORS = None
        prime_rl.set_lora_num_tokens(self.tokens, reset_reference=True)
        scales = torch.full_like(self.tokens, ALPHA / self.r, dtype=self.x.dtype)
        prime_rl.set_multilora_scaling(scales, reset_reference=True)
        layer = prime_rl.MultiLoRALinear(self.model[0], self.r, self.K, ALPHA)
        with torch.no_grad():
            for k, member in enumerate(self.members):
                layer.lora_A[k].copy_(member["0.lora_A"])
                layer.lora_B[k].copy_(member["0.lora_B"])
        return layer

    def difference(self) -> float:
        """The largest between the outputs of `grouped` and `select`, over the largest output."""
        with torch.no_grad():
            ours, theirs = self.select(), self.grouped()
        return ((ours - theirs).abs().max() / ours.abs().max()).item()


def captured(steps: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """The steps that can be CUDA graphs, as graphs."""
    graphs = {}
    for name, step in steps.items():
        if name == "prime-rl":  # it reads sizes back from the GPU
            continue
        try:
            graphs[name] = replayed(step)
        except RuntimeError as error:
            print(f"{name} cannot be captured: {error}")
    return graphs


def installed() -> Any:
    """prime-rl's module of LoRA layers, or None."""
    try:
        return importlib.import_module("prime_rl.trainer.models.layers.lora")
    except ImportError as error:
        print(f"without prime-rl's own layer: {error}")
        return None


def measure(K: int, length: int, options: argparse.Namespace, prime_rl: Any) -> dict[str, Any]:
    """One row: all contenders at one K."""
    s = Setting(K, length, options)
    difference, steps = s.difference(), s.steps(prime_rl)
    assert difference < (0.02 if options.dtype == "bfloat16" else 1e-4), difference
    row: dict[str, Any] = {"K": K, "tokens of an example": length, "examples": s.n}
    row |= {"most examples": int(s.counts.max()), "difference": difference}
    row["mebibytes"] = {name: peak_bytes(step) / 2**20 for name, step in steps.items()}
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    kinds = {"eager": steps}
    if options.device == "cuda":
        kinds["captured"] = captured(steps)
    for kind, contenders in kinds.items():
        times = interleaved(contenders, options.rounds, clock=clock)
        row[f"{kind}, microseconds"] = {
            name: 1e6 * statistics.median(seconds) for name, seconds in times.items()
        }
        row[f"{kind}, over base"] = {name: ratio(times, name, "base") for name in times}
        shown = ", ".join(f"{name} {us:.0f}" for name, us in row[f"{kind}, microseconds"].items())
        print(f"K={K}, examples of {length} tokens, {kind}, us: {shown}", flush=True)
    return row


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--tokens", type=int, default=4096 if cuda else 1024, help="of a batch")
    parser.add_argument("--width", type=int, default=4096 if cuda else 512)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=50 if cuda else 20)
    options = parser.parse_args()
    prime_rl = installed()
    rows = []
    for length in (16, 64):
        for K in (1, 4, 16, 64):
            if K * length <= options.tokens:
                rows.append(measure(K, length, options, prime_rl))
    write("multilora", rows, settings=vars(options))


if __name__ == "__main__":
    main()
