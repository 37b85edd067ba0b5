"""Which layers of a model are adapted: a structural search, narrowed by names, widths and layer indices."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .errors import LoraFuncError, listing, near_misses
from .variant import Variant
from .weight import features, kind_of

ROLES = ("reader", "writer", "inner")


@dataclass(frozen=True)
class Targets:
    """Picks the linear layers of a model by path.

    Linear is what has `in_features`, `out_features` and a `weight` (so quantized layers qualify), and transformers' `Conv1D`.
    The width d_model is `hidden_size` of the model's text config, else the most frequent width among its linear layers.
    A linear layer that shares its weight with an embedding is left out unless one of `names` asks for it.
    """

    names: tuple[str, ...] = ()  # regexes, searched in the path; a layer must match one; () means all
    exclude: tuple[str, ...] = ("lm_head", "embed_tokens")  # regexes, searched in the path; a layer must match none
    roles: tuple[str, ...] = (
        "reader",
        "writer",
    )  # reader: d_in = d_model; writer: d_out = d_model; inner: neither; () means all
    layers: Collection[int] | None = (
        None  # indices of layers: the first number in the path, as 3 in model.layers.3.mlp; None: all
    )

    def __post_init__(self):
        for name in ("names", "exclude", "roles"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for pattern in self.names + self.exclude:
            check_pattern(pattern)
        if unknown := [role for role in self.roles if role not in ROLES]:
            raise LoraFuncError(f"unknown role {listing(unknown)}; a role is one of {listing(ROLES)}")
        if self.layers is not None:
            object.__setattr__(self, "layers", frozenset(self.layers))

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """path -> layer, in the order of `model.named_modules()`; a module that stands in the tree twice comes once.

        Raises LoraFuncError where nothing matches, where one of `names` matches nothing, and where one of `names` asks for a
        layer whose parent uses its weight without calling it.
        """
        linear = {path: module for path, module in model.named_modules() if kind_of(module)}
        uncalled = uncalled_layers(model)
        tied = {id(module._parameters.get("weight")) for module in model.modules() if isinstance(module, nn.Embedding)}
        width = d_model(model, linear)
        found = {}
        for path, layer in linear.items():
            if not self.admits(path, layer, width):
                continue
            asked = any(re.search(name, path) for name in self.names)
            if path in uncalled and asked:
                raise LoraFuncError(f"{path!r} cannot be adapted: {uncalled[path]} uses its weight without calling the layer")
            weight = layer._parameters.get("weight")  # not by the attribute, which some layers compute
            if path in uncalled or (weight is not None and id(weight) in tied and not asked):
                continue
            found[path] = layer
        for name in self.names:
            if not any(re.search(name, path) for path in found):
                why = fused(name, model) or second_path(name, model) or self.hint(name, linear)
                raise LoraFuncError(f"{self!r}: {name!r} matches no layer that the other fields admit.{why}")
        if not found:
            reason = f"; of {listing(uncalled)} the parents use the weight without calling the layer" if uncalled else ""
            raise LoraFuncError(f"{self!r} matches no layer of {type(model).__name__}{reason}.{self.hint('', linear)}")
        return found

    def admits(self, path: str, layer: nn.Module, width: int) -> bool:
        """Whether names, exclude, roles and layers all let this layer through."""
        if self.names and not any(re.search(name, path) for name in self.names):
            return False
        if any(re.search(name, path) for name in self.exclude):
            return False
        if self.layers is not None and layer_index(path) not in self.layers:
            return False
        return not self.roles or not roles_of(layer, width).isdisjoint(self.roles)

    def hint(self, name: str, linear: Mapping[str, nn.Module]) -> str:
        """What the model has instead, for an error: near misses of `name`, and some of the linear layers."""
        if not linear:
            return " The model has no linear layers."
        near = near_misses(name.strip("^$.\\"), [part for path in linear for part in (path.rsplit(".", 1)[-1], path)])
        kinds = dict.fromkeys(re.sub(r"\d+", "N", path) for path in linear)
        return f"{near} Its linear layers are {listing(kinds, limit=12)}"


def assign(rules: Variant | Mapping[str, Variant], targets: Targets, model: nn.Module) -> dict[str, tuple[Variant, nn.Module]]:
    """path -> (variant, layer). With a mapping pattern -> variant, the first pattern that matches a target names its variant.

    Raises LoraFuncError for rules of another type, and for a pattern that names no layer.
    """
    found = targets.find(model)
    if isinstance(rules, Variant):
        return {path: (rules, layer) for path, layer in found.items()}
    if not isinstance(rules, Mapping) or not rules or not all(isinstance(variant, Variant) for variant in rules.values()):
        raise LoraFuncError(f"rules must be a Variant such as LoRA(r=8), or a mapping pattern -> Variant, and not {rules!r}")
    chosen, used = {}, set()
    for pattern in rules:
        check_pattern(pattern)
    for path, layer in found.items():
        pattern = next((pattern for pattern in rules if re.search(pattern, path)), None)
        if pattern is not None:
            chosen[path] = (rules[pattern], layer)
            used.add(pattern)
    for pattern in rules:
        if pattern not in used:
            left_out = [path for path, module in model.named_modules() if kind_of(module) and re.search(pattern, path)]
            shadowed = [path for path in left_out if path in chosen]
            if shadowed:
                why = f" An earlier pattern takes {listing(shadowed)}"
            elif left_out:
                why = f" It matches {listing(left_out)}, which {targets!r} leaves out"
            else:
                why = fused(pattern, model) or second_path(pattern, model) or targets.hint(pattern, found)
            raise LoraFuncError(f"the pattern {pattern!r} names no layer.{why}")
    return chosen


def fused(name: str, model: nn.Module) -> str:
    """For an error: what `name` matches where a model keeps the matrices of all experts in one tensor."""
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            whole = f"{path}.{own}"
            if parameter.dim() == 3 and re.search(name, whole) and not isinstance(module, _ConvNd):
                return (
                    f" {whole!r} fuses {parameter.shape[0]} matrices in one tensor of shape {tuple(parameter.shape)}, which no "
                    "linear layer applies, so there is nothing to adapt; adapt the attention around it"
                )
    return ""


def second_path(name: str, model: nn.Module) -> str:
    """For an error: a layer that `name` matches where it stands in the tree a second time."""
    first = {id(module): path for path, module in model.named_modules() if kind_of(module)}
    for path, module in model.named_modules(remove_duplicate=False):
        known = first.get(id(module), path)
        if path != known and re.search(name, path):
            return f" {path!r} is the layer {known!r} once more, and is adapted with it, under that path"
    return ""


def check_pattern(pattern: str) -> None:
    """Raises LoraFuncError unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise LoraFuncError(f"{pattern!r} is not a regular expression: {error}") from error


def layer_index(path: str) -> int | None:
    """The first number in a path: 3 for 'model.layers.3.mlp.experts.7.up_proj'."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def roles_of(layer: nn.Module, width: int) -> set[str]:
    d_out, d_in = features(layer)
    return ({"reader"} if d_in == width else set()) | ({"writer"} if d_out == width else set()) or {"inner"}


def d_model(model: nn.Module, linear: Mapping[str, nn.Module]) -> int:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    hidden_size = getattr(config, "hidden_size", None)
    if isinstance(hidden_size, int):
        return hidden_size
    widths = Counter(width for layer in linear.values() for width in features(layer))
    return widths.most_common(1)[0][0] if widths else 0


def uncalled_layers(model: nn.Module) -> dict[str, str]:
    """path -> class of the parent, for linear layers whose parent hands their weight to a fused function."""
    return {
        f"{path}.out_proj".lstrip("."): type(module).__name__
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
