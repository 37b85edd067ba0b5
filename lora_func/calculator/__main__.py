"""The command line of the calculator: builds a model from its config, adapts it, and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..errors import LoraFuncError, check_extra

check_extra("demo", "transformers", "tyro")

import torch
import tyro
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lora_func as lf

from ..libraries.cuda_kernels import AsOnCUDA
from . import Cost, Live, calculate

COUNTED = tuple(
    name
    for name, kind in lf.VARIANTS.items()
    if kind.card.trainable and kind not in (lf.LoftQ, lf.EVA)
)
"""Those that can be adapted without data. LoftQ and EVA train what LoRA trains."""


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A causal language model on the device "meta", frozen and in train mode.

    `name` is one on the hub, a folder, or a file config.json. Raises LoraFuncError if there is no
    config.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LoraFuncError(
            f"no config of a model for {name!r}: give a name on the hub, a folder, or a file "
            f"config.json ({str(error).splitlines()[0]})"
        ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train().requires_grad_(False)


@dataclass(frozen=True)
class Options:
    """Counts the parameters and the memory of training an adapter, without weights or a GPU."""

    model: str
    """A causal language model: its name on the hub, a folder, or a file config.json."""
    variant: Literal[COUNTED] = "lora"  # pyright: ignore
    """Which adapter: a name of the catalogue."""
    r: int = 8
    """Rank, for variants that have one. Those along singular directions take 8 times as many."""
    targets: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="REGEX")] = None
    """Patterns of the layers to adapt. Default: those that the variant was made for."""
    batch: int = 1
    """Sequences of a step."""
    tokens: int = 1024
    """Tokens of a sequence."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the base. The adapter trains in float32."""
    checkpointing: bool = False
    """Whether each block of the model is computed again in backward."""


def main(options: Options) -> Cost:
    """Builds, adapts, counts and prints."""
    model: Any = build(options.model, getattr(torch, options.dtype))
    if options.checkpointing:
        again = {
            "context_fn": lambda: (AsOnCUDA(), AsOnCUDA())
        }  # modes end where a backward starts
        model.gradient_checkpointing_enable({"use_reentrant": False, **again})
    variant = lf.Card.suggested(lf.VARIANTS[options.variant], options.r)
    names = variant.card.layers if options.targets is None else options.targets
    ids = torch.empty(options.batch, options.tokens, dtype=torch.long, device="meta")
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    calibration = None if variant.statistic is None else [batch]
    targets = lf.Targets(names=names)
    with Live(), AsOnCUDA():  # calibration runs the model
        adapter, params = lf.adapt(model, variant, targets=targets, calibration=calibration)
    cost = calculate(adapter, model, params, batch)
    about = f"{options.batch} x {options.tokens} tokens, {options.dtype}"
    print(f"{options.model}, {variant}", f"{len(adapter.targets)} layers, {about}", cost, sep="\n")
    return cost


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m lora_func.calculator"))
