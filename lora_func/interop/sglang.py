"""Whether SGLang can serve a folder in PEFT's format, and what it must be told.

Written after the loading code of SGLang 0.5.23 (`sglang/srt/lora`). SGLang itself is not needed.
"""

from __future__ import annotations

import os
from typing import Any

from ..errors import listing
from .folder import read, refuse


def check(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments with which SGLang serves the adapter in a folder in PEFT's format.

        engine = sglang.Engine(model_path=model, lora_paths=[folder], **check(folder))

    SGLang has one rank and one scale alpha / r for all layers, whatever the config says of a
    layer. `lf.as_lora(adapter, params, r=r)` makes such an adapter.

    Raises:
        LoraFuncError: a folder that SGLang refuses, or that it would serve otherwise than PEFT,
            with all reasons.
    """
    found = read(folder, "SGLang")
    problems, config = found.problems, found.config
    r, alpha = config["r"], config["lora_alpha"]
    if config.get("use_rslora") and r != 1:
        problems.append("it divides alpha by r, and not by its root (use_rslora)")
    if other := [path for path, rank in found.ranks.items() if rank != r]:
        problems.append(
            f"it has one rank for all layers, and that of {listing(other, limit=3)} is not {r}. "
            "lf.as_lora(adapter, params, r=..) gives all layers one rank"
        )
    alphas = {path: found.of_layer(path, "alpha_pattern", "lora_alpha") for path in found.pairs}
    if other := [path for path, own in alphas.items() if own != alpha]:
        problems.append(
            f"it has one alpha for all layers, and that of {listing(other, limit=3)} is not {alpha}"
        )
    if found.stacks:
        problems.append(f"it reads no fused experts as PEFT stores them: {listing(found.stacks)}")
    refuse(folder, "SGLang", problems)
    names = sorted({path.rpartition(".")[2] for path in found.pairs})
    return {"enable_lora": True, "max_lora_rank": r, "lora_target_modules": names}
