"""Whether vLLM can serve a folder in PEFT's format, and what it must be told.

Written after the loading code of vLLM 0.33 (`vllm/lora`). vLLM itself is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from ..errors import listing
from .folder import read, refuse

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that `max_lora_rank` may be
HEADS = ("classifier", "score")  # the only whole modules that vLLM takes


def check(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments with which vLLM serves the adapter in a folder in PEFT's format.

        llm = vllm.LLM(model, **check(folder))
        llm.generate(prompts, lora_request=vllm.lora.request.LoRARequest("mine", 1, folder))

    `max_lora_rank` is the smallest that vLLM takes for this adapter; its default is 16. Fused
    experts also need `LoRARequest(.., is_3d_lora_weight=True)`. Whether the model has all of the
    layers, only vLLM knows: it refuses an adapter with others.

    Raises:
        LoraFuncError: a folder that vLLM refuses, or that it would serve otherwise than PEFT, with
            all reasons.
    """
    found = read(folder, "vLLM", HEADS)
    problems = found.problems + halved_experts(found.stacks)
    most = max(found.ranks.values(), default=1)
    if most > RANKS[-1]:
        problems.append(f"the rank {most} is above {RANKS[-1]}, vLLM's largest max_lora_rank")
    refuse(folder, "vLLM", problems)
    arguments = {"enable_lora": True, "max_lora_rank": next(r for r in RANKS if r >= most)}
    return arguments | ({"enable_mixed_moe_lora_format": True} if found.stacks else {})


def halved_experts(paths: Collection[str]) -> list[str]:
    """Why not, if only one of gate_up_proj (`experts.base_layer`) and down_proj is adapted."""
    experts = dict.fromkeys(path.removesuffix(".base_layer") for path in paths)
    half = [path for path in experts if not {path, f"{path}.base_layer"} <= set(paths)]
    return (
        [f"it needs factors of both gate_up_proj and down_proj of {listing(half)}"] if half else []
    )
