"""`adapter_config.json`: parsed and checked, and the variant that it means for a layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import LoraFuncError, listing, near_misses
from . import names
from .method import Folder, Method
from .methods import ELSEWHERE, METHODS, PROMPTS, TYPES
from .methods.lora import INITS

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
COMMON = (
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "peft_version", "target_modules", "exclude_modules", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "bias", "target_parameters"),
    *("trainable_token_indices", "ensure_weight_tying"),
)
"""Fields of all methods. Where the adapter is, the keys of its tensors tell."""
INSTEAD = {
    "alora_invocation_tokens": (
        "Its tensors are those of a plain LoRA. Remove the field from the config, load the folder, "
        "and say on which tokens it acts: adapted_forward(model, params, batch, active=mask)"
    ),
}
"""Fields that are no part of an adapter here -> what does the same."""


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a folder. Raises LoraFuncError for a folder without one, or with another."""
    path = folder / CONFIG
    if not path.is_file():
        inner = [found.parent.name for found in folder.glob(f"*/{CONFIG}")]
        hint = f"; it has adapters in {listing(inner)}: give one of these" if inner else ""
        raise LoraFuncError(f"there is no {CONFIG} in it{hint}")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise LoraFuncError(f"{CONFIG} is not JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise LoraFuncError(f"{CONFIG} has no peft_type, so PEFT did not write it")
    check_types(config)
    return config


LISTS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")


def check_types(config: Mapping[str, Any]) -> None:
    """Raises LoraFuncError for a common field that is not what PEFT writes there."""

    def strings(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    def indices(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int for item in value)

    for name, value in config.items():
        if name in (*LISTS, "layers_pattern", "feedforward_modules"):
            fits = value is None or isinstance(value, str) or strings(value)
        elif name == "layers_to_transform":
            fits = value is None or type(value) is int or indices(value)
        elif name.endswith("_pattern"):
            fits = value is None or isinstance(value, dict)
        else:
            continue
        if not fits:
            raise LoraFuncError(f"{CONFIG}: {name} is {value!r}, which PEFT does not write")


def methods_of(config: Mapping[str, Any]) -> list[Method]:
    """The methods of a config, of which each layer has one. Raises LoraFuncError if it has none."""
    kind = config["peft_type"]
    if kind in PROMPTS:
        raise LoraFuncError(
            f"{kind} trains tokens or states that are put before the input, and lora_func adapts "
            "weights: keep using PEFT for it"
        )
    if ELSEWHERE.get(kind):
        raise LoraFuncError(f"{kind} cannot be read: {ELSEWHERE[kind]}")
    if kind in ELSEWHERE:
        return []
    if kind not in TYPES:
        raise LoraFuncError(
            f"the method {kind!r} is none that lora_func has.{near_misses(kind, TYPES)} It reads "
            f"{listing(sorted(TYPES), limit=50)}. merge_and_unload in PEFT makes a plain model of "
            "any other"
        )
    own = [method for method in METHODS if method.peft_type == kind]
    fitting = [method for method in own if not mismatch(method, config)]
    if not fitting:
        raise LoraFuncError(refusal(own, config))
    for method in fitting:
        check_known(method, config)
    return fitting


def mismatch(method: Method, config: Mapping[str, Any]) -> list[str]:
    """The fields of a config that have not the values of a method."""
    return [
        name
        for name, wanted in method.when.items()
        if config.get(name, allowed(wanted)[0]) not in allowed(wanted)
    ]


def allowed(wanted: Any) -> tuple[Any, ...]:
    """The values of an entry of `Method.when`."""
    return wanted if isinstance(wanted, tuple) else (wanted,)


def refusal(own: list[Method], config: Mapping[str, Any]) -> str:
    """Why none of the methods fits a config."""
    nearest = min(own, key=lambda method: len(mismatch(method, config)))
    field = mismatch(nearest, config)[0]
    value = config[field]
    what = f"{config['peft_type']} with {field}={value!r} cannot be read"
    if field == "init_lora_weights":
        why = next((INITS[k] for k in INITS if str(value).startswith(k)), "")
        convert = (
            "In PEFT, save_pretrained(.., path_initial_model_for_weight_conversion=..) writes the "
            "same adapter as a plain LoRA"
        )
        return f"{what}: {why}. {convert}" if why else f"{what}. {convert}"
    values = listing(allowed(nearest.when[field]))
    return f"{what}: lora_func has no such form of it, only that with {values}"


def check_known(method: Method, config: Mapping[str, Any]) -> None:
    """Raises LoraFuncError for a field that may change what the adapter computes."""
    known = {*COMMON, *method.when, *method.fields.values(), *method.defaults, *method.idle}
    known |= {*method.patterns.values(), method.dropout}
    for name, value in config.items():
        if value and name not in known and not name.startswith("init_"):
            raise LoraFuncError(
                f"{config['peft_type']} with {name}={value!r} cannot be read: lora_func has no "
                f"such option, and without it the adapter would be another. {INSTEAD.get(name, '')}"
            )


def variant_of(method: Method, folder: Folder) -> Any:
    """The variant of one layer. Raises LoraFuncError for fields that it does not take."""
    config, given = folder.config, {}
    for ours, theirs in method.fields.items():
        value = config.get(theirs, method.defaults.get(theirs))
        if theirs in method.patterns:
            found = config.get(method.patterns[theirs])
            value = names.exception(found, folder.path, method.anchored, value)
        given[ours] = value
    try:
        return method.kind(**{**given, **method.read(folder)})
    except LoraFuncError:
        raise
    except Exception as error:  # of any kind: a config may hold any value
        raise LoraFuncError(f"{CONFIG} has fields of another type ({error!r})") from error


def dropout_of(method: Method, config: Mapping[str, Any]) -> float:
    """The dropout of an adapter."""
    value = config.get(method.dropout, 0.0) if method.dropout else 0.0
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise LoraFuncError(f"{CONFIG}: {method.dropout} is {value!r}, which is no probability")
    return float(value)
