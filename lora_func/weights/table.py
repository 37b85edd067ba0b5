"""The table of ways in which a layer can hold its matrix, and the functions that look one up."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraFuncError
from ..libraries import torch_hooks
from ..libraries.functorch import in_transform
from ..variant import Weight
from .asked import asked
from .bitsandbytes import Float8bitWeight, Packed4bitWeight, Packed8bitWeight
from .dequantized import DequantizedWeight, DequantizingLayer
from .layer import Conv1DWeight, LayerWeight, TransposedWeight

KINDS: tuple[type[LayerWeight], ...] = (
    Packed4bitWeight,
    Packed8bitWeight,
    Float8bitWeight,
    DequantizedWeight,
    DequantizingLayer,
    Conv1DWeight,
    LayerWeight,
)
"""The first that matches reads a layer."""


def kind_of(module: Any) -> type[LayerWeight] | None:
    """The way in which a module holds a matrix, or None if it is no linear layer."""
    if type(module) is nn.Linear and type(module._parameters.get("weight")) is nn.Parameter:
        return LayerWeight
    return next((kind for kind in KINDS if kind.matches(module)), None)


def features(module: Any) -> tuple[int, int]:
    """`(d_out, d_in)` of a linear layer, as it declares them."""
    return weight_of(module).features


def weight_of(layer: Any, transposed: bool = False) -> LayerWeight:
    """The `Weight` of a linear layer. Raises LoraFuncError for any other module.

    `transposed`: whether `read` found that a layer of an unknown class holds `[in, out]`.
    """
    kind = kind_of(layer)
    if kind is None:
        raise LoraFuncError(
            f"{type(layer).__name__} is not a linear layer: it needs in_features, out_features and "
            "a weight"
        )
    return TransposedWeight(layer) if transposed else kind(layer)


def read(path: str, layer: Any) -> LayerWeight:
    """The `Weight` of the layer at `path`, checked. The one way into this room for new adapters.

    Raises LoraFuncError, naming the layer and its class, if its matrix cannot be read.
    """
    weight, kind = weight_of(layer), type(layer).__name__
    plain = type(layer).forward is nn.Linear.forward and "forward" not in vars(layer)
    unknown = type(weight) is LayerWeight and not plain
    stored = torch_hooks.stored_weight(layer) if unknown else None
    shape = None if stored is None or nn.parameter.is_lazy(stored) else tuple(stored.shape)
    if shape == weight.features[::-1]:  # if square, the layer is asked
        weight = TransposedWeight(layer)
    if problem := weight.problem():
        raise LoraFuncError(f"{path!r} is a {kind} {problem}")
    answer = asked(layer) if unknown else weight
    if isinstance(answer, LayerWeight):
        return answer
    name = path.rpartition(".")[2]
    pattern = f"^{re.escape(path)}$" if name.isdecimal() else f"{re.escape(name)}$"
    hint = f"exclude=({pattern!r},)"
    raise LoraFuncError(f"{path!r} is a {kind}{answer}. Leave it out, as in Targets({hint})")


class Snapshot(Weight):
    """A `Weight` whose dense matrix is read at most once, for the init of one layer."""

    def __init__(self, weight: Weight):
        self.weight = weight
        self.read: Tensor | None = None

    @property
    def matrix(self) -> Tensor:  # pyright: ignore  (an attribute of a plain Weight)
        if self.read is None:
            self.read = self.weight.dense().detach()
        return self.read

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore
        return self.weight.bias

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        return self.weight.device


def fingerprint(weight: Weight, samples: int = 64) -> str | None:
    """A short hash of entries spread over the matrix; None on the device "meta".

    A file knows by it the base that it was made on. The entries are rounded to bfloat16: one
    checkpoint has one fingerprint, loaded in bfloat16 or in float32. A packed weight is
    dequantized, and has another fingerprint than the matrix that it was made from.
    """
    if weight.device.type == "meta":
        return None
    matrix = weight.dense().detach()
    steps = torch.arange(samples, device=matrix.device)
    index = steps * (matrix.numel() - 1) // (samples - 1)
    chosen = matrix[torch.unravel_index(index, matrix.shape)] if matrix.dim() else matrix
    entries = chosen.to(torch.bfloat16).float().cpu().tolist()
    return hashlib.sha256(repr((*matrix.shape, entries)).encode()).hexdigest()[:16]


def class_in_view(module: nn.Module) -> type[nn.Module]:
    """The class of a module's copy in a view: for a packed layer, one that transforms can pass."""
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter or (weight is None and "in_features" not in module.__dict__):
        return type(module)  # the cheap answer first: every module is asked at every call
    kind = kind_of(module)
    return passable(type(module)) if kind is not None and kind.opaque else type(module)


PASSABLE: dict[type[nn.Module], type[nn.Module]] = {}  # functools.cache would warn under dynamo


def passable(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a packed layer's class.

    It runs the layer's own kernel; inside a transform, the product with the layer's `Weight`.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wants_grad = x.requires_grad and torch.is_grad_enabled()
        if in_transform() or (wants_grad and weight_of(self).inference_only):
            weight = weight_of(self)
            out = weight(x)
            return out if weight.bias is None else out + weight.bias.to(out.dtype)
        return kind.forward(self, x, *args, **kwargs)

    if kind not in PASSABLE:
        PASSABLE[kind] = type(kind.__name__, (kind,), {"forward": forward})
    return PASSABLE[kind]
