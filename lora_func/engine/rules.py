"""The rules of `adapt`: which variant adapts each target."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ..errors import LoraFuncError, listing
from ..variant import Variant
from ..weights.parameter import ParameterWeight
from ..weights.table import kind_of, read
from .parameters import (
    check_once,
    check_site,
    drop_second_sides,
    holders,
    rows_or_kernel,
    say_passed_over,
    say_shared,
    second_holder,
)
from .sites import Found
from .targets import Targets, check_pattern, second_path


def assign(
    rules: Variant | Mapping[str, Variant], targets: Targets, model: nn.Module
) -> list[Found]:
    """The targets, each with its variant: of a mapping, that of the first pattern that matches.

    Raises LoraFuncError for rules of another type, for a pattern that names nothing, and for a
    layer or a parameter that cannot be adapted.
    """
    if isinstance(rules, Variant):
        layers = targets.find(model)
        parameters = targets.find_parameters(model)
        chosen = dict.fromkeys([*layers, *parameters], rules)
    else:
        check_rules(rules)
        named = {path for path, module in model.named_modules() if kind_of(module)}
        named |= rows_or_kernel(model, rules).keys()
        known = holders(model)
        of_layers = [p for p in rules if any(re.search(p, path) for path in named)]
        rest = [p for p in rules if p not in of_layers]
        of_parameters = [p for p in rest if any(re.search(p, path) for path in known)]
        parameters = targets.find_parameters(model, of_parameters)
        layers = targets.find(model, of_layers) if of_layers else {}
        say_passed_over(of_layers, [*named, *parameters], known)
        first = {
            path: next((p for p in rules if re.search(p, path)), None)
            for path in (*layers, *parameters)
        }
        chosen = {path: rules[p] for path, p in first.items() if p is not None}
        for pattern in rules:
            if pattern not in first.values():
                why = unused(pattern, chosen, targets, model)
                raise LoraFuncError(f"the pattern {pattern!r} names no layer.{why}")
    check_once(
        {path: layer for path, layer in layers.items() if path in chosen},
        {path: weight for path, weight in parameters.items() if path in chosen},
    )
    drop_second_sides(chosen, layers)
    weights = {path: weight_at(path, layer) for path, layer in layers.items() if path in chosen}
    weights |= parameters
    found = [Found(path, variant, weights[path]) for path, variant in chosen.items()]
    for site in found:
        if isinstance(site.weight, ParameterWeight):
            check_site(site.path, site.variant, site.weight)
    say_shared(model, found)
    return found


def weight_at(path: str, layer: nn.Module) -> Any:
    """The weight of a layer: linear, or an embedding or a convolution."""
    if kind_of(layer) is not None:
        return read(path, layer)
    if layer._parameters.get("weight") is None:
        sources = [f"{path}.{name}" for name, _ in layer.named_parameters() if name != "bias"]
        raise LoraFuncError(
            f"{path!r} computes its weight from {listing(sources)}, as weight_norm does. Adapt "
            f"one of these, as in Targets(parameters=({re.escape(sources[-1])!r},))"
        )
    weight = ParameterWeight(layer, "weight", f"{path}.weight")
    if problem := weight.problem():
        raise LoraFuncError(f"the parameter {weight.path!r} {problem}")
    return weight


def check_rules(rules: Any) -> None:
    """Raises LoraFuncError unless `rules` is a mapping pattern -> Variant."""
    kinds = list(rules.values()) if isinstance(rules, Mapping) else []
    if not kinds or not all(isinstance(variant, Variant) for variant in kinds):
        raise LoraFuncError(
            "rules must be a Variant such as LoRA(r=8), or a mapping pattern -> Variant, not "
            f"{rules!r}"
        )
    for pattern in rules:
        check_pattern(pattern)


def unused(pattern: str, chosen: Collection[str], targets: Targets, model: nn.Module) -> str:
    """Why a pattern of the rules names no layer, for an error."""
    linear = {path: module for path, module in model.named_modules() if kind_of(module)}
    left_out = [path for path in linear if re.search(pattern, path)]
    left_out = left_out or [path for path in holders(model) if re.search(pattern, path)]
    if shadowed := [path for path in left_out if path in chosen]:
        return f" An earlier pattern takes {listing(shadowed)}"
    if left_out:
        return f" It matches {listing(left_out)}, which {targets!r} leaves out"
    return (
        second_path(pattern, model)
        or second_holder(pattern, model)
        or targets.hint(pattern, linear)
    )
