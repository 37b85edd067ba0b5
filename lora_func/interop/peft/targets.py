"""What a folder adapts: its tensors, sorted by the layers and the parameters of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...engine.rules import weight_at
from ...errors import LoraFuncError, listing, near_misses
from ...weights.parameter import ParameterWeight
from ...weights.table import kind_of
from . import names
from .config import WEIGHTS
from .method import Method
from .methods.lora import EMBEDDING, experts, laid_out

LEVEL = ".base_layer"  # PEFT's, one for each further wrapper around a module


class Target(NamedTuple):
    """One adapted layer or parameter."""

    path: str
    method: Method
    weight: Any
    tensors: dict[str, Tensor]  # by the part of the key below the path


def targets_of(
    config: Mapping[str, Any],
    methods: list[Method],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
) -> tuple[list[Target], dict[str, Tensor]]:
    """The targets, in the order of the model, and the tensors that belong to none.

    Raises LoraFuncError for a layer that the model does not have, or that cannot be adapted.
    """
    sorted_, rest = by_layer(methods, tensors)
    modules = dict(model.named_modules())
    if unknown := [path for path, _ in sorted_ if path not in modules]:
        outer = unknown[0].partition(f"{LEVEL}.")[0]  # of torch's attention, whose parts PEFT wraps
        if outer != unknown[0] and outer in modules:
            layer_weight(outer, modules[outer])
        raise LoraFuncError(no_layer(unknown[0], model))
    places = {path: place for place, path in enumerate(modules)}
    targets = []
    for path, level in sorted(sorted_, key=lambda key: (places[key[0]], -key[1])):
        module, own = modules[path], sorted_[path, level]
        if level or (config.get("target_parameters") and not names.is_target(config, path)):
            targets.append(parameter(config, path, level, module, own))
        else:
            method = next(method for method in methods if method.layers(config, path))
            weight = layer_weight(path, module)
            targets.append(Target(path, laid_out(method, weight), weight, own))
    return targets, rest


def by_layer(
    methods: list[Method], tensors: Mapping[str, Tensor]
) -> tuple[dict[tuple[str, int], dict[str, Tensor]], dict[str, Tensor]]:
    """(path of a module, how many wrappers are between) -> its tensors; and the rest."""
    known = {key for method in methods for key in method.keys}
    known |= {leaf.key for method in methods if method.copied for leaf in method.shared.values()}
    if any(method.peft_type == "LORA" for method in methods):
        known |= {leaf.key for leaf in EMBEDDING.values()}
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        part = next((part for part in sorted(known) if key.endswith(f".{part}")), None)
        if part is None:
            rest[key] = tensor
            continue
        path, level = key.removesuffix(f".{part}"), 0
        while path.endswith(LEVEL):
            path, level = path.removesuffix(LEVEL), level + 1
        found.setdefault((path, level), {})[part] = tensor
    return found, rest


def layer_weight(path: str, module: nn.Module) -> Any:
    """The weight of a layer. Raises LoraFuncError for what is neither linear nor known as such."""
    if kind_of(module) is None and "weight" not in module._parameters:
        raise LoraFuncError(
            f"{path!r} is a {type(module).__name__}, which is no linear layer, embedding or "
            "convolution. merge_and_unload in PEFT makes a plain model of it"
        )
    return weight_at(path, module)


def no_layer(path: str, model: nn.Module) -> str:
    """The message for a layer that the model does not have."""
    kind, paths = type(model).__name__, [name for name, _ in model.named_modules() if name]
    for name in paths:
        if name.endswith(f".{path}"):
            inner = name.removesuffix(f".{path}")
            return f"{kind} has no layer {path!r}, but its part {inner!r} has: load onto that"
        if path.endswith(f".{name}"):
            outer = path.removesuffix(f".{name}")
            return (
                f"{kind} has no layer {path!r}, but {name!r}. It is the part {outer!r} of the "
                "model that the adapter was made for: load onto that model"
            )
    return f"{kind} has no layer {path!r}.{near_misses(path, paths)}"


def parameter(
    config: Mapping[str, Any], path: str, level: int, module: nn.Module, own: dict[str, Tensor]
) -> Target:
    """A parameter that target_parameters names.

    PEFT wraps a module once for each of them, in their order, so the last one is outermost.
    """
    named = config.get("target_parameters") or []
    found = wrapped(path, module, named)
    if level >= len(found):
        raise LoraFuncError(
            f"the folder has adapters of {level + 1} parameters of {path!r}, where "
            f"target_parameters={named} names {listing(found) or 'none'}"
        )
    name = found[len(found) - 1 - level]
    weight = ParameterWeight(module, name, f"{path}.{name}")
    if problem := weight.problem():
        raise LoraFuncError(f"the parameter {weight.path!r} {problem}")
    return Target(weight.path, experts(weight), weight, own)


def wrapped(path: str, module: nn.Module, named: list[str]) -> list[str]:
    """The parameters of the module at a path that target_parameters names, innermost first."""
    return [
        name
        for name, held in module._parameters.items()
        if held is not None and names.ends(f"{path}.{name}", named)
    ]


def check_all_there(config: Mapping[str, Any], targets: list[Target], model: nn.Module) -> None:
    """Raises LoraFuncError if the config names layers of which the file has nothing."""
    named = config.get("target_modules")
    if isinstance(named, str) and named.lower() == names.ALL_LINEAR:
        return
    found = {target.path for target in targets}
    missing = [
        path
        for path, _ in model.named_modules()
        if path and path not in found and names.is_target(config, path)
    ]
    if missing:
        raise LoraFuncError(
            f"the config names {listing(missing)}, and {WEIGHTS} has nothing for them: the file "
            "is not whole, or the model is another one"
        )
