"""A training step in the shapes of models that people train, in each way that a step can run.

A step is a forward and a backward: to the input embeddings for the base, which is all that a frozen
model has to do, and to the adapter for the others. All contenders of a row run interleaved in one
process, on weights of their own or shared ones, with PEFT's same method beside ours. A round is
several steps, launched as a training loop launches them: without a wait for the GPU between them.
"ours" is a call of the adapter, and "bound" the same adapter bound to its model (`lf.bind`), which
builds no view in each step. "apart" is ours without the fused form of the variant. "base by
torch.func.grad" is the step of the base, taken by that.

    eager           as a training loop runs it
    checkpointing   with each block computed again in backward
    compiled        by torch.compile, and ours also as torch.func.grad
    graph           as one CUDA graph, replayed
    nf4             on a base in 4 bits, and ours also as torch.func.grad
    population      as a training loop runs it, with an adapter for each sequence of the batch

`python bench/speed.py --help`
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from common import commit, interleaved, peak, peft_config, qwen3, ratio, repeated, replayed, write
from overhead import LINEAR, Q_V
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lora_func as lf
from lora_func.libraries.cuda_kernels import AsOnCUDA

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TARGETS = {"q, v": Q_V, "all linear": LINEAR}


@dataclass(frozen=True)
class Row:
    """What is measured together."""

    shape: str
    layers: int
    batch: int
    tokens: int
    way: str
    variant: str
    targets: str


ROWS = [
    *(Row("8B", 32, 2, 2048, "eager", *case) for case in (
        ("lora", "all linear"), ("dora", "all linear"), ("lora", "q, v"), ("hra", "q, v"),
    )),
    *(Row("8B", 32, 4, 2048, "checkpointing", name, "all linear") for name in ("lora", "dora")),
    Row("8B", 8, 2, 2048, "compiled", "lora", "all linear"),
    *(Row("8B", 8, 2, 2048, "nf4", name, "all linear") for name in ("lora", "dora")),
    *(Row("0.6B", 28, 4, 512, "eager", name, targets)
      for name in ("lora", "dora") for targets in TARGETS),
    *(Row("0.6B", 28, 4, 512, "graph", *case) for case in (
        ("lora", "all linear"), ("dora", "q, v"), ("hra", "q, v"),
    )),
    *(Row("0.6B", 28, 64, 256, "population", *case) for case in (
        ("lora", "q, v"), ("lora", "all linear"), ("dora", "q, v"), ("hra", "q, v"),
    )),
    Row("8B", 8, 8, 512, "population", "lora", "all linear"),
]  # fmt: skip


def build(row: Row, options: argparse.Namespace) -> Any:
    """A frozen model with random weights."""
    dtype, layers = getattr(torch, options.dtype), min(row.layers, options.most_layers)
    if row.shape == "0.6B":
        return qwen3(layers, options.device, dtype)
    torch.manual_seed(0)
    with torch.device(options.device):
        model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes(options)))
    model = model.to(dtype)
    if row.way == "nf4":
        model = in_four_bits(model, options.device, dtype)
    return model.eval().requires_grad_(False)


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    """Those of Llama-3-8B, or of a toy to try this script."""
    small = {name: max(size // 64, 1) for name, size in LLAMA_8B.items()}
    return (
        {**small, "num_attention_heads": 4, "num_key_value_heads": 2} if options.toy else LLAMA_8B
    )


def in_four_bits(model: Any, device: str, dtype: torch.dtype) -> Any:
    """The model, quantized by transformers as users do it."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        kind = type(model)
        del model
        return kind.from_pretrained(
            folder, quantization_config=config, device_map=device, dtype=dtype
        )


class Contenders:
    """The steps of a row: of the base, of ours, of ours by torch.func, of PEFT's."""

    def __init__(self, row: Row, options: argparse.Namespace) -> None:
        names, self.row = TARGETS[row.targets], row
        self.variant = lf.VARIANTS[row.variant](r=options.r)  # pyright: ignore
        self.model = build(row, options)
        targets = lf.Targets(names=tuple(rf"\.{name}$" for name in names), roles=())
        self.adapter, params = lf.adapt(self.model, self.variant, targets=targets)
        self.apart, _ = lf.adapt(self.model, apart(self.variant), targets=targets)
        least = lf.Targets(names=(r"\.0\..*q_proj$",), roles=())
        self.least, self.least_params = lf.adapt(self.model, lf.LoRA(r=1), targets=least)
        if row.way == "population":
            params = lf.stack([self.adapter.init(self.model) for _ in range(row.batch)])
        self.leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
        self.theirs: Any = None
        if options.peft and row.way != "population":
            config = peft_config(self.variant, names)
            theirs = build(row, options)
            self.theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=True).eval()
        width = self.model.config.hidden_size
        shape = (row.batch, min(row.tokens, options.most_tokens), width)
        dtype = getattr(torch, options.dtype)
        embeds = 0.02 * torch.randn(shape, device=options.device, dtype=dtype)
        self.embeds = embeds.requires_grad_()
        self.batch = {"inputs_embeds": embeds, "use_cache": False, "logits_to_keep": 1}
        if row.way == "checkpointing":
            again: dict[str, Any] = {"use_reentrant": False}
            if options.device == "meta":  # modes end where a backward starts
                again["context_fn"] = lambda: (AsOnCUDA(), AsOnCUDA())
            for model in filter(None, (self.model, self.theirs)):
                model.train().gradient_checkpointing_enable(again)

    def forwards(self) -> dict[str, tuple[Callable[[], Tensor], Sequence[Tensor]]]:
        """Name -> the loss, and what it is derived by."""
        forwards: dict[str, tuple[Callable[[], Tensor], Sequence[Tensor]]] = {
            "base": (lambda: loss(self.model(**self.batch)), [self.embeds]),
            "ours": (lambda: self.loss_of(self.leaves), [*self.leaves.values()]),
        }
        if self.row.way in ("eager", "checkpointing", "nf4"):
            view = lf.bind(self.adapter, self.model, self.leaves)
            batch = {**self.batch, "inputs_embeds": self.embeds.detach()}
            forwards["bound"] = lambda: loss(view(**batch)), [*self.leaves.values()]
        if self.row.way == "graph":
            apart = lambda: self.loss_of(self.leaves, self.apart)  # noqa: E731
            forwards["apart"] = apart, [*self.leaves.values()]
        if self.theirs is not None:
            own = [p for p in self.theirs.parameters() if p.requires_grad]
            forwards["peft"] = lambda: loss(self.theirs(**self.batch)), own
        return forwards

    def steps(self) -> dict[str, Callable[[], Any]]:
        """Name -> a step, as the row runs it."""
        compiled = torch.compile if self.row.way == "compiled" else lambda forward: forward
        runs = self.forwards().items()
        steps = {who: stepped(compiled(run), wanted) for who, (run, wanted) in runs}
        if self.row.way in ("compiled", "nf4"):
            grad = compiled(torch.func.grad(self.loss_of))
            steps["torch.func.grad"] = lambda: grad(dict(self.leaves))
            of_base = compiled(torch.func.grad(self.loss_of_base))
            steps["base by torch.func.grad"] = lambda: of_base(self.embeds.detach())
        if self.row.way == "graph":
            steps = {who: replayed(step) for who, step in steps.items()}
        return steps

    def loss_of(self, params: dict[str, Tensor], adapter: lf.Adapter | None = None) -> Tensor:
        batch = {**self.batch, "inputs_embeds": self.embeds.detach()}
        return loss((adapter or self.adapter)(self.model, params, batch))

    def loss_of_base(self, embeds: Tensor) -> Tensor:
        """By an adapter of one layer: torch.func cannot pass a 4-bit layer by itself."""
        return loss(
            self.least(self.model, self.least_params, {**self.batch, "inputs_embeds": embeds})
        )


def apart(variant: lf.Variant) -> lf.Variant:
    """The variant without its fused form: the base layer runs, and then `apply`."""
    kind = type(variant)
    return type(kind.__name__, (kind,), {"fused": lf.Variant.fused})(**vars(variant))


def loss(out: Any) -> Tensor:
    return out.logits.float().square().mean()


def stepped(forward: Callable[[], Tensor], wanted: Sequence[Tensor]) -> Callable[[], Any]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(forward(), wanted, allow_unused=True)


def measure(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Times over the base, and memory beyond it."""
    contenders = Contenders(row, options)
    steps, errors = {}, {}
    for who, step in contenders.steps().items():
        try:
            step()
            steps[who] = step
        except (torch.OutOfMemoryError, RuntimeError) as error:
            errors[who] = str(error)[:300]
        gc.collect()
    loops = {who: repeated(step, options.in_a_row) for who, step in steps.items()}
    times = interleaved(loops, options.rounds)
    times = {who: [t / options.in_a_row for t in own] for who, own in times.items()}
    peaks = {who: peak(step) / 2**20 for who, step in steps.items()}
    return {
        **vars(row),
        "commit": commit(),
        "in a row": options.in_a_row,
        "milliseconds": {who: 1e3 * statistics.median(ts) for who, ts in times.items()},
        "over base": {who: ratio(times, who, "base") for who in steps},
        "mebibytes": peaks,
        "errors": errors,
        "seconds of a step, in each round": times,
    }


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="*", help="default: all")
    parser.add_argument("--shapes", nargs="*", default=["8B", "0.6B"])
    parser.add_argument("--ways", nargs="*", help="default: all that the machine can run")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--toy", action="store_true", help="tiny widths, to try the script")
    parser.add_argument("--most-layers", type=int, default=32 if cuda else 2)
    parser.add_argument("--most-tokens", type=int, default=2048 if cuda else 64)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8 if cuda else 3)
    parser.add_argument("--in-a-row", type=int, default=4 if cuda else 1, help="steps of a round")
    parser.add_argument("--no-peft", dest="peft", action="store_false")
    options = parser.parse_args()
    ways = options.ways or [
        way for way in dict.fromkeys(row.way for row in ROWS) if cuda or way != "graph"
    ]
    rows = []
    for row in ROWS:
        if row.way not in ways or row.shape not in options.shapes:
            continue
        if row.variant not in (options.variants or [row.variant]):
            continue
        rows.append(measure(row, options))
        gc.collect()
        shown = ", ".join(
            f"{who} {x:.2f} (+{rows[-1]['mebibytes'][who] - rows[-1]['mebibytes']['base']:.0f} MiB)"
            for who, x in rows[-1]["over base"].items()
        )
        print(*vars(row).values(), "|", shown, rows[-1]["errors"] or "", flush=True)
        write("speed", rows, settings=vars(options))


if __name__ == "__main__":
    main()
