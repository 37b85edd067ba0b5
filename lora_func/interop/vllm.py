"""Whether vLLM can serve a folder in PEFT's format, and what it must be told.

Written after the loading code of vLLM 0.33 (`vllm/lora`). vLLM itself is not needed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import LoraFuncError, listing

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that `max_lora_rank` may be
HEADS = ("classifier", "score")  # the only whole modules that vLLM takes
INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # that leave the base as it is
REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of lora_B",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "trained rows of an embedding",
}
KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")

Shapes = Mapping[str, tuple[int, ...]]


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
    folder = Path(folder)
    config, shapes = config_of(folder), shapes_of(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LoraFuncError(
            f"{str(folder)!r} holds an adapter of the type {kind!r}, and vLLM serves LoRA alone. "
            "Write lf.as_lora(adapter, params) into a folder of its own"
        )
    pairs, problems = pairs_of(shapes, config)
    problems = [*unsupported(config), *problems]
    ranks = [rank_of(path, config) for path in pairs]
    for path, (A, B), rank in zip(pairs, pairs.values(), ranks):
        problems += misfits(path, A, B, rank)
    problems += halved_experts(pairs)
    most = max(ranks, default=1)
    if most > RANKS[-1]:
        problems.append(f"the rank {most} is above {RANKS[-1]}, vLLM's largest max_lora_rank")
    if problems:
        raise LoraFuncError(f"vLLM cannot serve {str(folder)!r}: " + "; ".join(problems))
    found = {"enable_lora": True, "max_lora_rank": next(rank for rank in RANKS if rank >= most)}
    stacks = any(map(is_stack, pairs))
    return found | ({"enable_mixed_moe_lora_format": True} if stacks else {})


def config_of(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises LoraFuncError."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise LoraFuncError(f"there is no file {str(path)!r}: give a folder in PEFT's format")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraFuncError(f"{str(path)!r} is not JSON ({error})") from error
    required = {"r": int, "lora_alpha": (int, float), "target_modules": (list, str, type(None))}
    if not isinstance(config, dict):
        raise LoraFuncError(f"{str(path)!r} holds no fields")
    for name, types in required.items():
        known = name in config and isinstance(config[name], types)
        if config.get("peft_type") == "LORA" and not known:
            raise LoraFuncError(f"{str(path)!r}: {name} is {config.get(name)!r}")
    return config


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape, of the tensors in adapter_model.safetensors. Raises LoraFuncError."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise LoraFuncError(f"there is no file {str(path)!r}: save the adapter as safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LoraFuncError(f"{str(path)!r} cannot be read ({error})") from error


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """What the config asks for and vLLM does not do."""
    found = [
        f"it does not do {what} ({name})" for name, what in REFUSED.items() if config.get(name)
    ]
    if config.get("bias", "none") != "none":
        found.append(f"it adds no biases (bias={config['bias']!r})")
    saved = [name for name in config.get("modules_to_save") or () if name not in HEADS]
    if saved:
        found.append(f"it takes no whole modules but {listing(HEADS)} (modules_to_save={saved})")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in INITS:
        found.append(
            f"init_lora_weights={init!r} changes the base, which vLLM does not. Convert the folder "
            "as PEFT's path_initial_model_for_weight_conversion does"
        )
    return found


def pairs_of(
    shapes: Shapes, config: Mapping[str, Any]
) -> tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...]]], list[str]]:
    """Path of each layer -> the shapes of A and B; and what vLLM cannot read."""
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    unknown = []
    for key, shape in shapes.items():
        heads = any(f".{name}." in key for name in config.get("modules_to_save") or ())
        if key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")) or heads:
            continue
        match = KEY.fullmatch(key)
        if match is None or (key.endswith(".weight") == ("lora_embedding_" in key)):
            unknown.append(key)
        else:
            halves.setdefault(match[1], {})[match[2]] = shape
    problems = [f"it knows no tensors like {listing(unknown, limit=3)}"] if unknown else []
    if lonely := [path for path, pair in halves.items() if len(pair) < 2]:
        problems.append(f"A or B is missing of {listing(lonely, limit=3)}")
    if not halves:
        problems.append("there are no factors of LoRA in it")
    return {path: (p["A"], p["B"]) for path, p in halves.items() if len(p) == 2}, problems


def rank_of(path: str, config: Mapping[str, Any]) -> int:
    """The rank by which vLLM and PEFT divide alpha for a layer."""
    name = path
    if path.endswith(".experts.base_layer"):
        name = f"{path.removesuffix('.base_layer')}.gate_up_proj"
    elif path.endswith(".experts"):
        name = f"{path}.down_proj"
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return rank
    return config["r"]


def misfits(path: str, A: tuple[int, ...], B: tuple[int, ...], rank: int) -> list[str]:
    """Why the factors of a layer are not those of a linear layer with this rank."""
    if len(A) != 2 or len(B) != 2:
        return [f"{path!r} is no linear layer: its factors have the shapes {A} and {B}"]
    fits = A[0] % rank == 0 if is_stack(path) else A[0] == rank
    if A[0] != B[1] or not fits:
        return [f"{path!r} has factors of the shapes {A} and {B}, and the config says rank {rank}"]
    return []


def is_stack(path: str) -> bool:
    """Whether the factors are those of all experts, as PEFT stores fused ones."""
    return path.endswith((".experts", ".experts.base_layer"))


def halved_experts(paths: Collection[str]) -> list[str]:
    """Why not, if only one of gate_up_proj (`experts.base_layer`) and down_proj is adapted."""
    experts = dict.fromkeys(path.removesuffix(".base_layer") for path in paths if is_stack(path))
    half = [path for path in experts if not {path, f"{path}.base_layer"} <= set(paths)]
    return (
        [f"it needs factors of both gate_up_proj and down_proj of {listing(half)}"] if half else []
    )
