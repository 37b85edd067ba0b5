"""A training step (forward, backward, AdamW) in eager mode, compiled, and as one CUDA graph.

Eager PyTorch on a fast GPU waits for the CPU to launch kernels, and an adapter adds a dozen per
layer. The adapted forward is a pure function, so the step can be compiled or captured as it
stands. Needs a GPU. `python bench/launches.py --help`
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import interleaved, qwen3, ratio, replayed, write
from overhead import LINEAR, Q_V

import lora_func as lf


def measure(names: list[str], compiled: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the step with LoRA on the layers of these names."""
    model = qwen3(options.layers, "cuda", torch.bfloat16)
    targets = lf.Targets(names=tuple(rf"\.{name}$" for name in names), roles=())
    adapter, params = lf.adapt(model, lf.LoRA(r=options.r), targets=targets)
    ids = torch.randint(1000, (options.batch, options.tokens), device="cuda")

    def loss(p: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        batch = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
        return adapter(model, p, batch).logits.float().square().mean()

    def trainer(gradients):
        leaves = {key: leaf.detach().clone().requires_grad_() for key, leaf in params.items()}
        optimizer = torch.optim.AdamW(leaves.values(), lr=1e-4, fused=True, capturable=True)

        def step() -> None:
            for leaf, grad in zip(leaves.values(), gradients(leaves)):
                leaf.grad = grad
            optimizer.step()

        return step

    def eager(leaves):
        return torch.autograd.grad(loss(leaves, ids), list(leaves.values()))

    def base() -> None:
        embeds = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits
        torch.autograd.grad(logits.float().square().mean(), embeds)

    contenders = {"base, eager": base, "eager": trainer(eager)}
    seconds = {}

    start = time.perf_counter()
    contenders["CUDA graph"] = replayed(trainer(eager))
    seconds["CUDA graph"] = time.perf_counter() - start

    if compiled:
        start = time.perf_counter()
        compiled_grad = torch.compile(torch.func.grad(loss), fullgraph=True)
        step = torch.no_grad()(trainer(lambda leaves: compiled_grad(dict(leaves), ids).values()))
        step()
        seconds["compiled"] = time.perf_counter() - start
        contenders["compiled"] = step

    times = interleaved(contenders, options.rounds, warmup=3)
    return {
        "targets": len(adapter.targets),
        "milliseconds": {who: 1e3 * statistics.median(ts) for who, ts in times.items()},
        "over base": {who: ratio(times, who, "base, eager") for who in contenders},
        "seconds to prepare": seconds,
        "seconds of each round": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28, help="of the Qwen3-0.6B shape")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    choices: dict[str, Any] = {"default": ["q_v"], "choices": ["q_v", "all"]}
    parser.add_argument("--compile", nargs="*", **choices, help="targets to compile, too")
    options = parser.parse_args()
    rows = []
    for which, names in {"q_v": Q_V, "all": LINEAR}.items():
        rows.append(measure(names, which in options.compile, options))
        shown = ("targets", "milliseconds", "over base", "seconds to prepare")
        print(*(rows[-1][column] for column in shown), flush=True)
    write("launches", rows, settings=vars(options))


if __name__ == "__main__":
    main()
