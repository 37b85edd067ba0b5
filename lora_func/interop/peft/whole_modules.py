"""`Full` in a folder of PEFT's, which stores whole modules and not differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...errors import LoraFuncError, listing
from ...precision import at_least_float32
from ...weights.parameter import ParameterWeight
from . import names
from .whole import users


def trained(
    leaves: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, Any], model: nn.Module
) -> dict[str, dict[str, Tensor]]:
    """path of a module -> name -> parameter, with the differences added.

    A parameter that several modules hold is changed in all.
    """
    found: dict[str, dict[str, Tensor]] = {}
    known = users(model)
    for path, own in leaves.items():
        weight = weights[path]
        if isinstance(weight, ParameterWeight):
            P = added(weight.stored, weight.layout.as_stored(own["D"]))
            for place in known[id(weight.stored)]:
                module, _, name = place.rpartition(".")
                found.setdefault(module, {})[name] = P
            continue
        if weight.opaque:
            raise LoraFuncError(
                f"{path!r} has a Full on a packed weight, which PEFT could not store whole"
            )
        found.setdefault(path, {})["weight"] = weight.as_stored(added(weight.dense(), own["D"]))
        if "d" in own:
            found[path]["bias"] = added(weight.bias, own["d"])
    return found


def added(base: Tensor, difference: Tensor) -> Tensor:
    """The sum, at least in float32."""
    base = at_least_float32(base.detach())
    return base + difference.to(base)


def state(
    wholes: Mapping[str, Mapping[str, Tensor]], path: str, model: nn.Module
) -> dict[str, Tensor]:
    """All tensors of the module at a path, of which a Full has changed some."""
    return {**model.get_submodule(path).state_dict(), **wholes[path]}


def add_wholes(
    config: dict[str, Any], wholes: Mapping[str, Mapping[str, Tensor]], layers: Any, model: Any
) -> dict[str, Tensor]:
    """Adds whole modules to the config of a method. Returns their tensors.

    Raises LoraFuncError for a module that PEFT cannot store beside the method.
    """
    tensors, saved = {}, []
    for path, changed in wholes.items():
        if path not in layers:
            saved.append(path)
            whole = state(wholes, path, model)
            tensors |= {f"{path}.{name}": tensor for name, tensor in whole.items()}
        elif config["peft_type"] == "LORA" and set(changed) == {"bias"}:
            config["bias"] = "lora_only"
            tensors[f"{path}.base_layer.bias"] = changed["bias"]
        else:
            raise LoraFuncError(
                f"{path!r} has both an adapter and a Full, which {config['peft_type']} of PEFT "
                "cannot hold"
            )
    config["modules_to_save"] = check_saved(saved, model)
    return tensors


def only_wholes(
    wholes: Mapping[str, Mapping[str, Tensor]], model: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of an adapter of Full alone: PEFT's LN tuning, which takes any module."""
    tensors = {
        f"{path}.ln_tuning_layers.{name}": tensor
        for path in wholes
        for name, tensor in state(wholes, path, model).items()
    }
    known = [path for path, _ in model.named_modules() if path]
    config = {"peft_type": "LN_TUNING", "target_modules": names.shortest(wholes, known)}
    return {**config, "modules_to_save": None}, tensors


def check_saved(saved: list[str], model: Any) -> list[str] | None:
    """modules_to_save. Raises LoraFuncError if PEFT, which goes by ends of paths, takes more."""
    for path, _ in model.named_modules() if saved else ():
        if path not in saved and any(path.endswith(name) for name in saved):
            raise LoraFuncError(
                f"PEFT names whole modules by the ends of their paths, and would take {path!r} "
                f"for one of {listing(saved)}"
            )
    return saved or None
