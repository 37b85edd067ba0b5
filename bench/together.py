"""What it saves that equal layers prepare together: a step with and without, interleaved.

The model has the architecture of Qwen3 and widths so small that nearly all of its time is Python
and PyTorch asking for kernels. All 7 linear layers of its blocks are adapted, so there are as many
equal layers as blocks, or twice that. `python bench/together.py --help`
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, of_rank, qwen3, ratio, write
from overhead import LINEAR

import lora_func as lf
from lora_func.engine import together

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def with_fewest(fewest: float, step: Callable[[], Any]) -> Callable[[], Any]:
    """The step, in which so many equal layers are needed to prepare together."""

    def run() -> Any:
        before = together.FEWEST
        together.FEWEST = fewest  # pyright: ignore  (a constant, but for this measurement)
        try:
            return step()
        finally:
            together.FEWEST = before

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = qwen3(options.blocks, "cpu", torch.float32, **SIZES)
    embeds = torch.randn(1, 8, SIZES["hidden_size"])
    batch = {"inputs_embeds": embeds, "use_cache": False, "logits_to_keep": 1}
    for_base = {**batch, "inputs_embeds": embeds.clone().requires_grad_()}
    targets = lf.Targets(names=tuple(rf"\.{name}$" for name in LINEAR), roles=())
    rows = []
    for name, kind in lf.VARIANTS.items():
        if not kind.prepares_together or kind.card.data == "required":
            continue
        adapter, params = lf.adapt(model, of_rank(name, options.r), targets=targets)
        leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}

        def step(adapter: lf.Adapter = adapter, leaves: dict[str, Any] = leaves) -> Any:
            out = adapter(model, leaves, batch).logits.square().mean()
            return torch.autograd.grad(out, list(leaves.values()), allow_unused=True)

        steps = {
            "base": lambda: model(**for_base).logits.square().mean().backward(),
            "together": with_fewest(together.FEWEST, step),
            "alone": with_fewest(float("inf"), step),
        }
        times = interleaved(steps, options.rounds, clock=time.process_time)
        rows.append(
            {
                "variant": name,
                "milliseconds": {who: 1e3 * statistics.median(ts) for who, ts in times.items()},
                "over base": {who: ratio(times, who, "base") for who in ("together", "alone")},
                "together over alone": ratio(times, "together", "alone"),
                "seconds of each round": times,
            }
        )
        print(name, rows[-1]["over base"], f"{rows[-1]['together over alone']:.2f}", flush=True)
    write("together", rows, settings=vars(options))


if __name__ == "__main__":
    main()
