"""A folder in PEFT's format, as servers of adapters read it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ..errors import LoraFuncError, listing

REFUSED = {  # field of the config -> what no server does
    "use_dora": "DoRA",
    "lora_bias": "a bias of lora_B",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "trained rows of an embedding",
}
INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # that leave the base as it is
KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")

Shape = tuple[int, ...]


class Folder(NamedTuple):
    """What a folder holds, and why it cannot be served."""

    config: dict[str, Any]
    pairs: dict[str, tuple[Shape, Shape]]  # path of each layer -> the shapes of A and B
    problems: list[str]

    @property
    def ranks(self) -> dict[str, int]:
        """Path of each layer -> the rank by which PEFT divides alpha."""
        return {path: self.of_layer(path, "rank_pattern", "r") for path in self.pairs}

    def of_layer(self, path: str, pattern: str, default: str) -> Any:
        """The value of a field for one layer: of the first pattern that matches, as in PEFT."""
        name = path
        if path.endswith(".experts.base_layer"):
            name = f"{path.removesuffix('.base_layer')}.gate_up_proj"
        elif path.endswith(".experts"):
            name = f"{path}.down_proj"
        for key, value in (self.config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return self.config[default]

    @property
    def stacks(self) -> list[str]:
        """The paths of fused experts, whose factors PEFT stores side by side."""
        return [path for path in self.pairs if is_stack(path)]


def read(folder: str | os.PathLike[str], server: str, heads: tuple[str, ...] = ()) -> Folder:
    """A folder, with the problems that it is to every server.

    `heads`: the names of whole modules that the server takes. Raises LoraFuncError for what is no
    folder of LoRA.
    """
    folder = Path(folder)
    config, shapes = config_of(folder), shapes_of(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LoraFuncError(
            f"{str(folder)!r} holds an adapter of the type {kind!r}, and {server} serves LoRA "
            "alone. Write lf.as_lora(adapter, params) into a folder of its own"
        )
    pairs, problems = pairs_of(
        shapes, [h for h in config.get("modules_to_save") or () if h in heads]
    )
    found = Folder(config, pairs, [*unsupported(config, heads), *problems])
    for path, rank in found.ranks.items():
        found.problems.extend(misfits(path, *pairs[path], rank))
    return found


def refuse(folder: str | os.PathLike[str], server: str, problems: list[str]) -> None:
    """Raises LoraFuncError if there are problems."""
    if problems:
        raise LoraFuncError(f"{server} cannot serve {str(folder)!r}: " + "; ".join(problems))


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


def shapes_of(folder: Path) -> dict[str, Shape]:
    """Key -> shape, of the tensors in adapter_model.safetensors. Raises LoraFuncError."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise LoraFuncError(f"there is no file {str(path)!r}: save the adapter as safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            return {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except (SafetensorError, OSError) as error:
        raise LoraFuncError(f"{str(path)!r} cannot be read ({error})") from error


def unsupported(config: Mapping[str, Any], heads: tuple[str, ...]) -> list[str]:
    """What the config asks for and no server does."""
    found = [
        f"it does not do {what} ({name})" for name, what in REFUSED.items() if config.get(name)
    ]
    if config.get("bias", "none") != "none":
        found.append(f"it adds no biases (bias={config['bias']!r})")
    saved = [name for name in config.get("modules_to_save") or () if name not in heads]
    if saved:
        found.append(f"it takes no whole modules (modules_to_save={saved})")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in INITS:
        found.append(
            f"init_lora_weights={init!r} changes the base, which it does not. Convert the folder "
            "as PEFT's path_initial_model_for_weight_conversion does"
        )
    return found


def pairs_of(
    shapes: Mapping[str, Shape], heads: list[str]
) -> tuple[dict[str, tuple[Shape, Shape]], list[str]]:
    """Path of each layer -> the shapes of A and B; and what servers cannot read."""
    halves: dict[str, dict[str, Shape]] = {}
    unknown = []
    for key, shape in shapes.items():
        if key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue
        if any(f".{name}." in key for name in heads):
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


def misfits(path: str, A: Shape, B: Shape, rank: int) -> list[str]:
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
