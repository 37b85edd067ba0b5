"""What of a model is adapted: a structural search for layers, narrowed by names; and parameters."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import LoraFuncError, listing, near_misses
from ..libraries import torch_hooks, transformers
from ..weights.parameter import ParameterWeight
from ..weights.table import features, kind_of
from . import experts
from .parameters import holders, no_parameter, rows_or_kernel

ROLES = ("reader", "writer", "inner")
OUTER = re.compile(r"lm_head|embed_tokens")
HEADS = re.compile(
    r"(^|\.)(embed_out|proj_out|score|\w*classifier|qa_outputs)(\.|$)|^(head|heads\.head|head\.fc|fc)$"
)
"""Embeddings and heads, by name: they are adapted only if they are named outright. A name in HEADS
counts only outside of a model's stacks of blocks, since layers within have such names too."""


@dataclass(frozen=True)
class Targets:
    """Picks the linear layers of a model by path, and any other parameters by name.

    Linear is a layer with `in_features`, `out_features` and a `weight` (so quantized layers
    qualify), and transformers' `Conv1D`. If nothing is named, the default is every linear layer
    that reads from or writes to the residual stream, without embeddings and heads. What is named,
    here or by a pattern of the rules, is adapted whatever its width, also if it is a head, an
    embedding or a convolution.

    Whatever is no layer is a parameter: fused experts, weights that a parent reads, norms, biases.
    """

    names: tuple[str, ...] = ()
    """Regexes, searched in the path. A layer must match one; () means all, or none if `parameters`
    are named and the rules are one variant. Embeddings and convolutions are adapted if the last
    part of their path is named."""
    parameters: tuple[str, ...] = ()
    """Regexes, searched in the paths of parameters, as in "experts.*(gate_up|down)_proj$". () means
    those that a pattern of the rules matches, if it matches no layer."""
    exclude: tuple[str, ...] = ()
    """Regexes, searched in the path. A layer or a parameter must match none of them."""
    roles: tuple[str, ...] | None = None
    """"reader": d_in = d_model; "writer": d_out = d_model; "inner": neither; () means all. None
    means reader and writer, and all if something is named. d_model is `hidden_size` of the model's
    text config, otherwise the most frequent width among its linear layers."""
    layers: Collection[int] | None = None
    """Indices in the model's outermost stack of blocks, as 3 in model.layers.3.mlp. None: all."""

    def __post_init__(self) -> None:
        for name in ("names", "parameters", "exclude", "roles"):
            value = getattr(self, name)
            if value is not None:
                value = (value,) if isinstance(value, str) else tuple(value)
                object.__setattr__(self, name, value)
        for pattern in self.names + self.parameters + self.exclude:
            check_pattern(pattern)
        if unknown := [role for role in self.roles or () if role not in ROLES]:
            raise LoraFuncError(
                f"unknown role {listing(unknown)}; a role is one of {listing(ROLES)}"
            )
        if self.layers is not None:
            given: Any = self.layers
            indices = isinstance(given, Iterable) and not isinstance(given, str)
            if not indices or not all(type(index) is int for index in given):
                raise LoraFuncError(
                    f"layers={given!r}; expected indices of blocks, such as range(8) or [3]"
                )
            object.__setattr__(self, "layers", frozenset(given))

    def find(self, model: nn.Module, patterns: Collection[str] = ()) -> dict[str, nn.Module]:
        """path -> layer, in the order of `model.named_modules()`.

        A module that stands in the tree twice comes once. `patterns` are those of the rules: they
        name layers as `names` do.

        Raises:
            LoraFuncError: nothing matches; a name or an exclusion matches nothing; an index of
                `layers` does not exist; a named layer is never called by its parent.
        """
        linear = {path: module for path, module in model.named_modules() if kind_of(module)}
        self.check_exclusions(model)
        asked = [*self.names, *patterns]
        others = rows_or_kernel(model, asked)
        blocks = block_indices(model, {**linear, **others})
        self.check_layers(model, blocks)
        if self.parameters and not asked:
            if self.roles is not None:
                raise LoraFuncError(
                    f"roles={self.roles} are those of layers, and {self!r} names parameters alone: "
                    "leave roles= out, or name layers too"
                )
            return {}
        uncalled = torch_hooks.uncalled_layers(model)
        outer = outer_layers(model, linear, blocks)
        held_back = outer - named_outright(asked, outer, linear)
        roles = self.roles
        if roles is None:
            roles = () if asked else ("reader", "writer")
        width = d_model(model, linear)
        found, narrow = {}, []
        for path, layer in model.named_modules():
            if path not in linear and path not in others:
                continue
            if self.names and not matches(self.names, path):
                continue
            if not self.admits(path, blocks) or matches(self.exclude, f"{path}.weight"):
                continue
            named = matches(asked, path)
            if not matches(self.names, path) and matches(self.parameters, f"{path}.weight"):
                continue  # a pattern of the rules that names a layer matches its parameters too
            if path in uncalled and named:
                parameter = path.rpartition(".")[2] + r"\.weight$"
                raise LoraFuncError(
                    f"{path!r} cannot be adapted as a layer: {uncalled[path]} uses its weight "
                    "without calling the layer. Name the parameter, as in "
                    f"Targets(parameters=({parameter!r},)), or leave it out"
                )
            if path in held_back or path in uncalled:
                continue
            if path in linear and roles and roles_of(layer, width).isdisjoint(roles):
                narrow += [path] if named else []
                continue
            found[path] = layer
        if narrow:
            warnings.warn(
                f"roles={roles} leaves out {len(narrow)} layers that are named, such as "
                f"{narrow[0]!r}, whose widths are not {width}. Leave roles= out to adapt them",
                stacklevel=4,
            )
        for name in self.names:
            if not any(re.search(name, path) for path in found):
                why = (
                    experts.named(name, model)
                    or self.as_parameters(name, model)
                    or second_path(name, model)
                    or self.hint(name, linear)
                )
                raise LoraFuncError(
                    f"{self!r}: {name!r} matches no layer that the other fields admit.{why}"
                )
        if not found and not patterns and not self.parameters:
            raise LoraFuncError(
                f"{self!r} matches no layer of {type(model).__name__}"
                + (f"; the parents of {listing(uncalled)} never call it" if uncalled else "")
                + f".{self.hint('', linear)}"
            )
        return found

    def find_parameters(
        self, model: nn.Module, patterns: Collection[str] = ()
    ) -> dict[str, ParameterWeight]:
        """path -> what the parameter holds, in the order of `model.named_parameters()`.

        `patterns`: those of the rules that name parameters.

        Raises:
            LoraFuncError: a pattern matches no parameter; a parameter that cannot be adapted.
        """
        known = holders(model)
        blocks = block_indices(model, known)
        asked = self.parameters or patterns
        found = {
            path: ParameterWeight(*known[path], path)
            for path in known
            if matches(asked, path) and self.admits(path, blocks)
        }
        for pattern in asked:
            if not any(re.search(pattern, path) for path in found):
                left_out = [path for path in known if re.search(pattern, path)]
                why = f" {self!r} leaves out {listing(left_out)}" if left_out else None
                raise LoraFuncError(
                    f"parameters={pattern!r} matches no parameter that is to be adapted."
                    f"{why or no_parameter(pattern, model, list(known))}"
                )
        for path, weight in found.items():
            if problem := weight.problem():
                raise LoraFuncError(f"the parameter {path!r} {problem}")
        return found

    def admits(self, path: str, blocks: Mapping[str, int]) -> bool:
        """Whether `exclude` and `layers` let a path pass."""
        inside = self.layers is None or blocks.get(path) in self.layers
        return inside and not matches(self.exclude, path)

    def check_exclusions(self, model: nn.Module) -> None:
        """Raises LoraFuncError for a pattern of `exclude` that matches no module or parameter."""
        paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
        paths += holders(model)
        for pattern in self.exclude:
            if not any(re.search(pattern, path) for path in paths):
                parts = [part for path in paths for part in (path.rsplit(".", 1)[-1], path)]
                hint = near_misses(pattern.strip("^$.\\"), parts)
                raise LoraFuncError(
                    f"exclude={pattern!r} matches no module of {type(model).__name__}.{hint}"
                )

    def check_layers(self, model: nn.Module, blocks: Mapping[str, int]) -> None:
        """Raises LoraFuncError for an index of `layers` that the model does not have."""
        known = sorted(set(blocks.values()))
        if unknown := sorted(set(self.layers or ()) - set(known)):
            has = f"it has {known[0]} to {known[-1]}" if known else "it has no stack of blocks"
            raise LoraFuncError(
                f"layers={sorted(self.layers or ())}: {type(model).__name__} has no block "
                f"{listing(unknown)}; {has}"
            )

    def as_parameters(self, name: str, model: nn.Module) -> str:
        """For an error: parameters that a pattern for layers matches."""
        found = [path for path in holders(model) if re.search(name, path)]
        if not found:
            return ""
        return f" It matches the parameters {listing(found)}: Targets(parameters=({name!r},))"

    def hint(self, name: str, linear: Mapping[str, nn.Module]) -> str:
        """What the model has instead, for an error: near misses of `name`, and linear layers."""
        if not linear:
            return " The model has no linear layers."
        parts = [part for path in linear for part in (path.rsplit(".", 1)[-1], path)]
        near = near_misses(name.strip("^$.\\"), parts)
        kinds = dict.fromkeys(re.sub(r"\d+", "N", path) for path in linear)
        return f"{near} Its linear layers are {listing(kinds, limit=12)}"


def second_path(name: str, model: nn.Module) -> str:
    """For an error: a layer with two paths, of which `name` matches the later one."""
    first = {id(module): path for path, module in model.named_modules() if kind_of(module)}
    for path, module in model.named_modules(remove_duplicate=False):
        known = first.get(id(module), path)
        if path != known and re.search(name, path):
            return (
                f" {path!r} and {known!r} are one layer, which is adapted under the path {known!r}"
            )
    return ""


def matches(patterns: Collection[str], path: str) -> bool:
    """Whether one of the regexes is found in the path."""
    return any(re.search(pattern, path) for pattern in patterns)


def check_pattern(pattern: str) -> None:
    """Raises LoraFuncError unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise LoraFuncError(f"{pattern!r} is not a regular expression: {error}") from error


def block_indices(model: nn.Module, linear: Collection[str]) -> dict[str, int]:
    """path -> index in the outermost stack of blocks around it, for those that are in one.

    A stack is an nn.ModuleList, or another container with numbered children of one class: not
    nn.Sequential(model), whose 0 is no block. Without any stack, the first number in the path.
    """
    stacks = {path for path, module in model.named_modules() if is_stack(module)}
    found = {}
    for path in linear:
        parts = path.split(".")
        for position, part in enumerate(parts):
            if part.isdecimal() and (not stacks or ".".join(parts[:position]) in stacks):
                found[path] = int(part)
                break
    return found


def is_stack(module: nn.Module) -> bool:
    """Whether a module is a stack of numbered blocks."""
    names = list(module._modules)
    if not names or not all(name.isdecimal() for name in names):
        return False
    kinds = {type(child) for child in module._modules.values()}
    return isinstance(module, nn.ModuleList) or (len(names) > 1 and len(kinds) == 1)


def outer_layers(
    model: nn.Module, linear: Mapping[str, nn.Module], blocks: Collection[str]
) -> set[str]:
    """Heads, and layers whose weight is an embedding's: adapted only if they are named outright."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tied = {id(module._parameters.get("weight")) for module in embeddings} - {id(None)}
    stacked = any(is_stack(module) for module in model.modules())
    found = set()
    for path, layer in linear.items():
        weight = layer._parameters.get("weight")  # not by the attribute, which may be computed
        by_name = OUTER.search(path) or (stacked and path not in blocks and HEADS.search(path))
        if by_name or id(weight) in tied:
            found.add(path)
    return found


def named_outright(
    patterns: Collection[str], outer: Collection[str], linear: Collection[str]
) -> set[str]:
    """The outer layers that a pattern matches by a name which only outer layers have.

    "lm_head" and "(q_proj|lm_head)$" name the head; "." and "dense$" do not.
    """
    common = {part for path in linear if path not in outer for part in path.split(".")}
    found = set()
    for path in outer:
        rest = ".".join(part if part in common else "\0" for part in path.split("."))
        if any(re.search(p, path) and not re.search(p, rest) for p in patterns):
            found.add(path)
    return found


def roles_of(layer: nn.Module, width: int) -> set[str]:
    """The roles of a layer in a model of this width."""
    d_out, d_in = features(layer)
    return ({"reader"} if d_in == width else set()) | ({"writer"} if d_out == width else set()) or {
        "inner"
    }


def d_model(model: nn.Module, linear: Mapping[str, nn.Module]) -> int:
    """The width of the residual stream."""
    size = transformers.hidden_size(model)
    if size is not None:
        return size
    widths = Counter(width for layer in linear.values() for width in features(layer))
    return widths.most_common(1)[0][0] if widths else 0
