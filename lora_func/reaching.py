"""`reach`: how much of a model the targets are, and what they leave out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .engine.adapter import Adapter
from .engine.parameters import EMBEDDINGS, holders
from .engine.targets import Targets, block_indices, matches, outer_layers
from .errors import LoraFuncError
from .libraries import torch_hooks
from .weights.parameter import ParameterWeight
from .weights.table import features, kind_of

ROWS = 12  # of each kind that a printed table shows


class Part(NamedTuple):
    """Parameters of a model whose paths differ by numbers alone."""

    path: str
    """The path of the parameters, with N for each number."""
    tensors: int
    """How many tensors these are."""
    parameters: int
    """How many numbers they hold."""
    note: str
    """Why they are left out, or ""."""


@dataclass(frozen=True)
class Reach:
    """What targets reach of a model. Printed, it is a table."""

    model: str
    """Class of the model."""
    parameters: int
    """Number of parameters of the model. A packed weight counts as what it unpacks to."""
    targets: int
    """Number of targets."""
    reached: int
    """Number of parameters in their weights."""
    trainable: int | None
    """Number of trainable parameters of an adapter; None for targets without one."""
    adapted: tuple[Part, ...]
    """What the targets are, the largest first."""
    left_out: tuple[Part, ...]
    """What they leave out, the largest first, and why."""

    @property
    def share(self) -> float:
        """The share of the model's parameters that lie in the targets."""
        return self.reached / max(self.parameters, 1)

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.targets} targets hold {self.reached:,} of {self.parameters:,} "
            f"parameters ({self.share:.1%})"
        ]
        if self.trainable is not None:
            part = self.trainable / max(self.parameters, 1)
            lines.append(f"trainable: {self.trainable:,} ({part:.2%} of the model)")
        rows = [("adapted", part) for part in self.adapted[:ROWS]]
        rows += [("left out", part) for part in self.left_out[:ROWS]]
        width = max((len(part.path) for _, part in rows), default=0)
        for kind, part in rows:
            share = part.parameters / max(self.parameters, 1)
            lines.append(
                f"{kind:<8}  {part.tensors:>5} x {part.path:<{width}}  {share:>6.1%}  {part.note}"
            )
        hidden = max(len(self.adapted) - ROWS, 0) + max(len(self.left_out) - ROWS, 0)
        return "\n".join(
            [*(line.rstrip() for line in lines), *([f"and {hidden} more"] * (hidden > 0))]
        )


def reach(model: nn.Module, targets: Targets | Adapter = Targets()) -> Reach:
    """How much of `model` the targets reach: targets, parameters, share, and what is left out.

    Nothing is computed, so a model on the device "meta" will do.

    Args:
        model: any module.
        targets: a Targets, or an Adapter, for which trainable parameters are counted too.

    Raises:
        LoraFuncError: targets that match nothing, as for `adapt`.
    """
    if isinstance(targets, Adapter):
        sites = {
            path: base.tensor or f"{path}.weight".removeprefix(".")
            for path, base in targets.base.items()
        }
        trainable, rules = sum(s.numel() for s in targets.shapes.values()), Targets()
    elif isinstance(targets, Targets):
        sites = {path: f"{path}.weight".removeprefix(".") for path in targets.find(model)}
        sites |= {path: path for path in targets.find_parameters(model)}
        trainable, rules = None, targets
    else:
        raise LoraFuncError(f"targets must be a Targets or an Adapter, not {targets!r}")
    sizes = sizes_of(model)
    reached = {tensor for tensor in sites.values() if tensor in sizes}
    why = Reasons(model, rules)
    adapted = grouped({path: (sizes[path], "") for path in reached})
    rest = [path for path in sizes if path not in reached]
    left_out = grouped({path: (sizes[path], why.of(path)) for path in rest})
    total, own = sum(sizes.values()), sum(sizes[path] for path in reached)
    return Reach(type(model).__name__, total, len(sites), own, trainable, adapted, left_out)


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Path of each parameter -> number of its entries; of a packed weight, unpacked."""
    sizes = {}
    for path, (module, name) in holders(model).items():
        stored: Any = module._parameters[name]
        if isinstance(stored, nn.UninitializedParameter):
            problem = ParameterWeight(module, name, path).problem()
            raise LoraFuncError(f"the parameter {path!r} {problem}")
        packed = name == "weight" and kind_of(module) and not stored.is_floating_point()
        sizes[path] = torch.Size(features(module)).numel() if packed else stored.numel()
    for path, module in model.named_modules():  # those that compute their weight, or hide it
        weight = f"{path}.weight".removeprefix(".")
        if kind_of(module) and weight not in sizes and module._parameters.get("weight") is None:
            sizes = {p: size for p, size in sizes.items() if not p.startswith(f"{path}.")}
            sizes[weight] = torch.Size(features(module)).numel()
    return sizes


def grouped(sizes: Mapping[str, tuple[int, str]]) -> tuple[Part, ...]:
    """Parts by their paths without numbers and by their notes, the largest first."""
    parts: dict[tuple[str, str], list[int]] = defaultdict(list)
    for path, (size, note) in sizes.items():
        parts[re.sub(r"\d+", "N", path), note].append(size)
    found = [Part(path, len(own), sum(own), note) for (path, note), own in parts.items()]
    return tuple(sorted(found, key=lambda part: -part.parameters))


class Reasons:
    """Why targets leave a parameter out."""

    def __init__(self, model: nn.Module, targets: Targets):
        self.targets = targets
        self.held = holders(model)
        self.linear = {path: module for path, module in model.named_modules() if kind_of(module)}
        self.blocks = block_indices(model, [*self.held, *self.linear])
        self.outer = outer_layers(model, self.linear, self.blocks)
        self.uncalled = torch_hooks.uncalled_layers(model)

    def of(self, path: str) -> str:
        """The reason for one path."""
        layer, _, name = path.rpartition(".")
        if matches(self.targets.exclude, path) or matches(self.targets.exclude, layer):
            return "excluded"
        if self.targets.layers is not None and self.blocks.get(path) not in self.targets.layers:
            return "in another block"
        if layer in self.uncalled:
            return f"{self.uncalled[layer]} reads it: name the parameter"
        if layer in self.linear and name == "weight":
            if layer in self.outer:
                return "a head: name it"
            named = self.targets.names or self.targets.parameters
            return "not named" if named else "on no side as wide as the model: name it"
        module, _ = self.held[path]
        if isinstance(module, EMBEDDINGS):
            return "an embedding: name it"
        if torch_hooks.is_convolution(module) and name == "weight":
            return "a convolution: name it"
        axes = module._parameters[name].dim()  # pyright: ignore  (it holds it)
        if axes == 3:
            return "a stack: name the parameter"
        return "a parameter: name it" if axes == 2 else "no matrix: lf.Full() takes it"
