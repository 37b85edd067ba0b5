"""K adapters in one pass of the base: time and memory of a training step, beside other ways.

A step is a forward, the cross-entropy of every example, and a backward to all K adapters. Each
adapter has its own examples.

    base         the frozen base on the same batch, backward to the input embeddings: a lower bound
    population   the K adapters as one stacked dict, whose leaves are trained: one pass for all
    select       the same, with a copy of an adapter for each of its examples
    stacked      K dicts of leaves, one for each parameter group of an optimizer, stacked each step
    vmap(grad)   torch.func over the whole model
    one by one   the adapters, one after the other
    peft         one LoRA of PEFT, K times; switching between adapters would only add to it

The ways run interleaved in one process. On CUDA, those that take K passes run once for K > 4.
`python bench/population.py --help`
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import torch.nn.functional as F
from common import interleaved, of_rank, peak_bytes, qwen3, ratio, synchronize, write
from overhead import LAYERS, Q_V
from torch import Tensor

import lora_func as lf

TARGETS = lf.Targets(names=tuple(rf"\.{name}$" for name in Q_V), roles=())


def loss_per_example(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each sequence, `[n]`."""
    return F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)


class Setting:
    """A model, K adapters and `examples` sequences for each."""

    def __init__(
        self, model, variant: lf.Variant, K: int, examples: int, options: argparse.Namespace
    ):
        self.model, self.K, self.examples = model, K, examples
        self.adapter, _ = lf.adapt(model, variant, targets=TARGETS)
        self.adapters = [self.adapter.init(model) for _ in range(K)]
        self.ids = torch.randint(1000, (K * examples, options.tokens), device=options.device)
        self.owner = torch.arange(K, device=options.device).repeat_interleave(examples)
        self.stacked = {key: leaf.requires_grad_() for key, leaf in lf.stack(self.adapters).items()}
        self.leaves = [
            {key: leaf.requires_grad_() for key, leaf in params.items()} for params in self.adapters
        ]

    def clear(self) -> None:
        for params in (self.stacked, *self.leaves):
            for leaf in params.values():
                leaf.grad = None

    def step(self, params: dict[str, Tensor], ids: Tensor, each: int = 1) -> None:
        batch = {"input_ids": ids, "use_cache": False}
        logits = self.adapter(self.model, params, batch, each=each).logits
        loss_per_example(logits, ids).sum().backward()

    def base(self) -> None:
        embeds = self.model.get_input_embeddings()(self.ids).requires_grad_()
        logits = self.model(inputs_embeds=embeds, use_cache=False).logits
        torch.autograd.grad(loss_per_example(logits, self.ids).sum(), embeds)

    def population(self) -> None:
        self.step(self.stacked, self.ids, self.examples)
        self.clear()

    def select(self) -> None:
        self.step(lf.select(self.stacked, self.owner), self.ids)
        self.clear()

    def stack(self) -> None:
        self.step(lf.stack(self.leaves), self.ids, self.examples)
        self.clear()

    def one_by_one(self) -> None:
        for params, ids in zip(self.leaves, self.ids.split(self.examples)):
            self.step(params, ids)
        self.clear()

    def vmap_grad(self) -> None:
        def loss(params: dict[str, Tensor], ids: Tensor) -> Tensor:
            logits = self.adapter(self.model, params, {"input_ids": ids, "use_cache": False}).logits
            return loss_per_example(logits, ids).sum()

        stacked = {key: leaf.detach() for key, leaf in self.stacked.items()}
        torch.vmap(torch.func.grad(loss))(stacked, self.ids.unflatten(0, (self.K, self.examples)))


def measure_ways(
    K: int, examples: int, options: argparse.Namespace, model, theirs
) -> dict[str, Any]:
    """One row: every way to train K LoRAs."""
    s = Setting(model, lf.LoRA(r=options.r), K, examples, options)

    def peft_one_by_one() -> None:
        for ids in s.ids.split(examples):
            loss_per_example(theirs(input_ids=ids, use_cache=False).logits, ids).sum().backward()
        theirs.zero_grad()

    ways: dict[str, Callable[[], None]] = {
        "base": s.base,
        "population": s.population,
        "select": s.select,
        "stacked": s.stack,
        "vmap(grad)": s.vmap_grad,
        "one by one": s.one_by_one,
        "peft": peft_one_by_one,
    }
    once = ("one by one", "peft") if K > 4 and torch.cuda.is_available() else ()
    peaks, times = {}, {}
    for name in list(ways):
        if name == "vmap(grad)" and not torch.cuda.is_available():
            continue  # on a CPU, saved-tensor hooks count the bytes; torch.func does not allow them
        try:
            start = time.perf_counter()
            peaks[name] = peak_bytes(ways[name]) / 2**20
            synchronize()
            if name in once:
                times[name] = [time.perf_counter() - start] * options.rounds
        except torch.OutOfMemoryError:
            del ways[name]
    if K * examples > 16:
        ways.pop("vmap(grad)", None)  # it takes all the memory, or more
    many = {name: run for name, run in ways.items() if name not in once}
    return {
        "variant": "lora",
        "K": K,
        "examples": examples,
        **summary(interleaved(many, options.rounds) | times, peaks),
    }


def measure_variant(
    name: str, variant: lf.Variant, options: argparse.Namespace, model
) -> dict[str, Any]:
    """One row: a population of another variant."""
    s = Setting(model, variant, options.variants_K, 1, options)
    ways = {"base": s.base, "population": s.population}
    peaks = {way: peak_bytes(run) / 2**20 for way, run in ways.items()}
    return {
        "variant": name,
        "K": options.variants_K,
        "examples": 1,
        **summary(interleaved(ways, options.rounds), peaks),
    }


def summary(times: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, Any]:
    """The measured part of a row, which it prints, too."""
    found = {
        "milliseconds": {way: 1e3 * statistics.median(seconds) for way, seconds in times.items()},
        "over base": {way: ratio(times, way, "base") for way in times},
        "mebibytes": peaks,
        "seconds of each round": times,
    }
    rounded = {
        way: f"{found['milliseconds'][way]:.0f} ms, {peaks.get(way, 0):.0f} MiB" for way in times
    }
    print(rounded, flush=True)
    return found


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--layers", type=int, default=28 if cuda else 4, help=LAYERS)
    parser.add_argument("--tokens", type=int, default=256 if cuda else 32)
    parser.add_argument("--vocabulary", type=int, default=151936 if cuda else 8192)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5 if cuda else 3)
    size: dict[str, Any] = {"type": int, "default": 64 if cuda else 16}
    parser.add_argument("--sequences", **size, help="largest K x examples, which memory limits")
    parser.add_argument("--variants-K", **size, help="size of the populations of other variants")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    model, copy = (
        qwen3(options.layers, options.device, dtype, vocab_size=options.vocabulary)
        for _ in range(2)
    )
    theirs = peft.get_peft_model(copy, peft.LoraConfig(r=options.r, target_modules=Q_V))
    rows = []
    for examples in (1, 4):
        for K in (64, 16, 4, 1):
            if K * examples <= options.sequences:
                rows.append(measure_ways(K, examples, options, model, theirs))
                write("population", rows, settings=vars(options))
    for name in ("pissa", "dora", "delora", "ia3", "ia3ff", "hra"):
        rows.append(measure_variant(name, of_rank(name, options.r), options, model))
        write("population", rows, settings=vars(options))


if __name__ == "__main__":
    main()
