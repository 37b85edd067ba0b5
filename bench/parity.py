"""Training curves beside PEFT's: the same method, parameters, batches and optimizer.

Both start from the same numbers and see the same batches, in float32. What remains is the order of
sums, which AdamW amplifies where a gradient is nearly zero. `python bench/parity.py --help`
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import torch
from common import peft_config, write
from torch import Tensor, nn
from tqdm import tqdm

import lora_func as lf
from lora_func.demo.model import load_model


class Twin(NamedTuple):
    """A variant, and how PEFT stores its parameters."""

    variant: lf.Variant
    leaves: dict[str, tuple[str, Callable[[Tensor], Tensor]]]  # leaf -> parameter, and its value
    anchors: Mapping[str, str] = MappingProxyType(
        {}
    )  # frozen leaf -> the parameter from whose start it is taken
    fields: Mapping[str, Any] = MappingProxyType({})  # of PEFT's config, beside the card's


def same(t: Tensor) -> Tensor:
    """PEFT stores the leaf as it is."""
    return t


A_B = {"A": ("lora_A.default.weight", same), "B": ("lora_B.default.weight", same)}
TWINS = {
    "lora": Twin(lf.LoRA(r=8), A_B),
    "dora": Twin(lf.DoRA(r=8), {**A_B, "m": ("lora_magnitude_vector.default.weight", same)}),
    "pissa": Twin(
        lf.PiSSA(r=8), A_B, {"A0": "lora_A.default.weight", "B0": "lora_B.default.weight"}
    ),
    "ia3": Twin(lf.IA3(), {"d": ("ia3_l.default", lambda d: (1 + d)[:, None])}),
    "oft": Twin(
        lf.OFT(),
        {"v": ("oft_R.default.weight", lambda v: -v)},  # the inverse rotation
        fields={"oft_block_size": 32, "use_cayley_neumann": False},
    ),
    "hra": Twin(lf.HRA(r=8), {"U": ("hra_u.default", lambda U: U.mT)}),
}


def compare(twin: Twin, model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Trains both on the batches, one after the other in each step: a row of the result."""
    names = [pattern.rstrip("$") for pattern in twin.variant.card.layers]
    targets = lf.Targets(names=twin.variant.card.layers)
    generator = torch.Generator().manual_seed(0)
    adapter, _ = lf.adapt(model, twin.variant, targets=targets, generator=generator)
    config = peft_config(twin.variant, names, **twin.fields)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    parameters = dict(theirs.named_parameters())

    def parameter(path: str, name: str) -> Tensor:
        return parameters[f"base_model.model.{path}.{name}"]

    if twin.anchors:  # the signs of singular vectors are arbitrary: take PEFT's
        frozen = {
            f"{path}.lora_{leaf}": parameter(path, name).detach().clone()
            for path in adapter.targets
            for leaf, name in twin.anchors.items()
        }
        adapter = lf.Adapter(adapter.variants, adapter.shapes, frozen, adapter.base, adapter.dtype)
    leaves = adapter.init(model, generator=generator)
    for leaf in leaves.values():
        leaf.requires_grad_()
    pairs = []  # our leaf as PEFT stores it, and PEFT's parameter
    for path in adapter.targets:
        for leaf, (name, convert) in twin.leaves.items():
            pairs.append((leaves[f"{path}.lora_{leaf}"], convert, parameter(path, name)))
    with torch.no_grad():
        for ours, convert, their in pairs:
            their.copy_(convert(ours))

    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(leaf.numel() for leaf in leaves.values())
    lr = twin.variant.card.lr
    optimizers = [
        torch.optim.AdamW(group, lr=lr, weight_decay=0.0) for group in (leaves.values(), trained)
    ]
    curves: dict[str, list[float]] = {"ours": [], "peft": []}
    for batch in tqdm(batches, desc=twin.variant.name(), leave=False):
        losses = {"ours": adapter(model, leaves, batch).loss, "peft": theirs(**batch).loss}
        for (who, loss), optimizer in zip(losses.items(), optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[who].append(loss.item())
    moved = max((convert(ours) - their).abs().max().item() for ours, convert, their in pairs)
    return {
        "variant": twin.variant.name(),
        "lr": lr,
        "parameters": sum(leaf.numel() for leaf in leaves.values()),
        "largest difference": max(abs(a - b) for a, b in zip(*curves.values())),
        "largest difference of a parameter": moved,
        "fall": curves["peft"][0] - min(curves["peft"]),
        "curves": curves,
    }


def batches_of(
    tokenizer: Any, folder: Path, steps: int, batch: int, length: int
) -> list[dict[str, Tensor]]:
    """Questions and answers, padded on the right, with the loss on the answers."""
    from sweep import data  # noqa: PLC0415  (a test imports this module without it)

    problems = data.encode(tokenizer, data.read(folder, "train.jsonl"), length)
    if len(problems) < steps * batch:
        raise lf.LoraFuncError(
            f"{len(problems)} problems have at most {length} tokens, and {steps * batch} are "
            "needed: give a larger --length"
        )
    batches = []
    for i in range(0, steps * batch, batch):
        rows = problems[i : i + batch]
        longest = max(len(row.tokens) for row in rows)
        ids = torch.zeros(batch, longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, own, kept, wanted in zip(rows, ids, mask, labels):
            n = len(row.tokens)
            own[:n], kept[:n] = torch.tensor(row.tokens), 1
            wanted[row.start : n] = own[row.start : n]
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--model", help="for transformers; default: the embedded SmolLM2")
    parser.add_argument("--variants", nargs="*", default=list(TWINS), choices=list(TWINS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=96, help="tokens of the longest problem")
    options = parser.parse_args()
    model, tokenizer, name = load_model(options.model, dtype=torch.float32)
    model = model.eval().requires_grad_(False)
    batches = batches_of(tokenizer, options.data, options.steps, options.batch, options.length)
    rows = []
    settings = {k: v for k, v in vars(options).items() if k != "data"} | {"model": name}
    for variant in options.variants:
        row = compare(TWINS[variant], model, batches)
        rows.append(row)
        print(
            f"{variant}: the loss falls by {row['fall']:.3f}; ours and PEFT's differ by at most "
            f"{row['largest difference']:.1e}, parameters by "
            f"{row['largest difference of a parameter']:.1e}",
            flush=True,
        )
        write("parity", rows, settings=settings)


if __name__ == "__main__":
    main()
