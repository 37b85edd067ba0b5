"""Fused experts: the time and memory of one block, over the frozen base and beside PEFT's LoRA.

A step is a forward and a backward to the block's input (the base's whole work), and to the adapter
if there is one. `forward` is that alone, without gradients. `in a row` is one of several steps that
are launched without waiting for the device, as a training loop launches them; `step` also holds the
time in which the device waits for the first kernel. The contenders run interleaved in one process:

    base           the frozen block
    lora, pissa    low-rank: grouped products of the factors, no dense tensor
    dora           not low-rank: the dense tensors of the stacks
    lora, dense    LoRA by the same way, as a variant without `factors` goes
    lora x 8       8 adapters, each with an eighth of the tokens
    peft           PEFT's LoRA, `target_parameters`

Memory is the peak of a step beyond what was allocated before it, with the gradients of the adapter.
`python bench/experts.py --help`
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from common import interleaved, peak, ratio, write
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lora_func as lf

TARGETS = lf.Targets(parameters=(r"experts\.(gate_up|down)_proj$",))
IN_A_ROW = 4
# Implementation, rank, share of the tokens, contenders. `batched_mm` and `eager` take fewer tokens:
# the first copies a matrix for each token and expert.
ROWS: tuple[tuple[str, int, float, tuple[str, ...]], ...] = (
    ("grouped_mm", 16, 1, ("lora", "pissa", "dora", "lora, dense", "lora x 8", "peft")),
    ("grouped_mm", 4, 1, ("lora", "peft")),
    ("batched_mm", 16, 1 / 64, ("lora", "dora", "lora x 8", "peft")),
    ("eager", 16, 1 / 8, ("lora", "dora", "lora x 8", "peft")),
)


@dataclass(frozen=True, kw_only=True)
class Dense(lf.LoRA):
    """LoRA that does not tell its factors."""

    factors: Any = lf.Variant.factors

    def merged(self, weight, params):
        # W + s B A
        return weight.dense() + self.scale * params["B"] @ params["A"], weight.bias


VARIANTS = {
    "lora": lf.LoRA,
    "pissa": partial(lf.PiSSA, svd="randomized"),  # the exact one of each expert takes minutes
    "dora": lf.DoRA,
    "lora, dense": Dense,
}


class Block(nn.Module):
    """The experts of one layer of Qwen3-MoE."""

    def __init__(self, implementation: str, options: argparse.Namespace):
        super().__init__()
        config = Qwen3MoeConfig(
            num_experts=options.experts,
            hidden_size=options.hidden,
            moe_intermediate_size=options.width,
        )
        config._experts_implementation = implementation
        self.experts = Qwen3MoeExperts(config)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, ids, weights)


def block(implementation: str, options: argparse.Namespace) -> Block:
    """A frozen block with random weights, the same at each call."""
    torch.manual_seed(0)
    with torch.device(options.device):
        made = (
            Block(implementation, options).to(getattr(torch, options.dtype)).requires_grad_(False)
        )
        for parameter in made.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return made


def contender(
    name: str, model: Block, batch: tuple[Tensor, ...], r: int
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The forward of a contender and the tensors that it trains."""
    if name == "base":
        return lambda: model(*batch), []
    if name == "peft":
        names = ["experts.gate_up_proj", "experts.down_proj"]
        config = peft.LoraConfig(r=r, lora_alpha=16, target_modules=[], target_parameters=names)
        theirs = peft.get_peft_model(model, config)  # pyright: ignore  (any module does)
        return lambda: theirs(*batch), [p for p in theirs.parameters() if p.requires_grad]
    kind, _, several = name.partition(" x ")
    variant: Any = VARIANTS[kind]
    adapter, params = lf.adapt(model, variant(r=r), targets=TARGETS)
    if several:
        params = lf.stack([params] * int(several))
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    return lambda: adapter(model, leaves, batch), list(leaves.values())


def measure(
    implementation: str, r: int, share: float, names: tuple[str, ...], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of an implementation and a rank."""
    tokens = int(options.tokens * share)
    x = torch.randn(tokens, options.hidden, device=options.device)
    x = x.to(getattr(torch, options.dtype)).requires_grad_()
    scores = torch.randn(tokens, options.experts, device=options.device).softmax(-1)
    weights, ids = scores.topk(options.top)
    batch = (x, ids, (weights / weights.sum(-1, keepdim=True)).to(x.dtype))
    frozen = block(implementation, options)
    toward = torch.randn_like(x)
    forwards, steps = {}, {}
    for name in ("base", *names):
        model = block(implementation, options) if name == "peft" else frozen
        call, leaves = contender(name, model, batch, r)
        forwards[name] = torch.no_grad()(call)
        steps[name] = lambda call=call, own=(x, *leaves): torch.autograd.grad(call(), own, toward)
    peaks = {name: peak(run) / 2**20 for name, run in steps.items()}
    loops = {name: repeated(run) for name, run in steps.items()}
    times = {
        "forward": interleaved(forwards, options.rounds),
        "step": interleaved(steps, options.rounds),
        "in a row": interleaved(loops, options.rounds // IN_A_ROW + 1, warmup=1),
    }
    calls = {"forward": 1, "step": 1, "in a row": IN_A_ROW}
    rows = []
    for name in steps:
        over = {what: ratio(taken, name, "base") for what, taken in times.items()}
        milliseconds = {
            what: 1e3 * statistics.median(taken[name]) / calls[what]
            for what, taken in times.items()
        }
        rows.append(
            {
                "contender": name,
                "implementation": implementation,
                "r": r,
                "tokens": tokens,
                "milliseconds": milliseconds,
                "time over base": over,
                "mebibytes": peaks[name],
                "mebibytes over base": peaks[name] - peaks["base"],
                "seconds of each round": {what: taken[name] for what, taken in times.items()},
            }
        )
        shown = "  ".join(
            f"{what} {milliseconds[what]:7.2f} ms ({over[what]:.2f}x)" for what in times
        )
        print(
            f"{implementation:10s} r={r:<2d} {tokens:4d} tokens  {name:11s}  {shown}  "
            f"{peaks[name]:6.1f} MiB ({peaks[name] - peaks['base']:+.1f})",
            flush=True,
        )
    return rows


def repeated(run: Callable[[], Any]) -> Callable[[], None]:
    """`run`, several times in a row."""

    def loop() -> None:
        for _ in range(IN_A_ROW):
            run()

    return loop


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--experts", type=int, default=128 if cuda else 16)
    parser.add_argument("--hidden", type=int, default=2048 if cuda else 1024)
    parser.add_argument("--width", type=int, default=768 if cuda else 384)
    parser.add_argument("--top", type=int, default=8 if cuda else 4, help="experts of a token")
    parser.add_argument("--tokens", type=int, default=4096 if cuda else 1024)
    parser.add_argument("--rounds", type=int, default=50 if cuda else 9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for given in ROWS for row in measure(*given, options)]
    write("experts", rows, settings=vars(options))


if __name__ == "__main__":
    main()
