"""Which layers are linear maps, and how each kind holds its matrix: a `Weight` reads the layer as it is at that moment."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoraFuncError
from .variant import Weight


class LinearWeight(Weight):
    """Of a layer with `weight [out_features, in_features]`: `nn.Linear` and what is built like it."""

    def __init__(self, layer: Any):
        self.layer = layer  # Any: nn.Module types each attribute as a tensor or a module

    @property
    def matrix(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def as_stored(self, W: Tensor) -> Tensor:
        """`W [d_out, d_in]` in the layout of the layer's own weight."""
        return W


class Conv1DWeight(LinearWeight):
    """Of transformers' `Conv1D`, GPT-2's linear layer, which holds the transpose."""

    @property
    def matrix(self) -> Tensor:
        return self.layer.weight.mT

    def as_stored(self, W: Tensor) -> Tensor:
        return W.mT


def kind_of(module: nn.Module) -> type[LinearWeight] | None:
    """The kind of linear map that `module` is, told by its structure, or None."""
    if type(module) is nn.Linear:
        return LinearWeight
    if not isinstance(getattr(module, "weight", None), Tensor):
        return None
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return LinearWeight
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx"):
        return Conv1DWeight
    return None


def features(module: Any) -> tuple[int, int]:
    """`(d_out, d_in)` of a linear layer, as it declares them."""
    if kind_of(module) is Conv1DWeight:
        return module.nf, module.nx
    return module.out_features, module.in_features


def weight_of(layer: Any) -> LinearWeight:
    """The `Weight` of a linear layer. Raises LoraFuncError for another module."""
    kind = kind_of(layer)
    if kind is None:
        raise LoraFuncError(f"{type(layer).__name__} is not a linear layer: it needs in_features, out_features and a weight")
    return kind(layer)


def check_layer(path: str, layer: Any) -> None:
    """Raises LoraFuncError, naming the class of the layer, where its matrix cannot be read."""
    weight = weight_of(layer)
    if nn.parameter.is_lazy(layer.weight):
        raise LoraFuncError(f"{path!r} is a {type(layer).__name__} without a weight yet: run the model once, then adapt it")
    if not layer.weight.is_floating_point() or weight.matrix.shape != features(layer):
        raise LoraFuncError(
            f"{path!r} is a {type(layer).__name__} with a weight of {layer.weight.dtype} and shape "
            f"{tuple(layer.weight.shape)}, where a floating one of shape {features(layer)} was expected; this way of packing a "
            "weight is not supported"
        )


def fingerprint(layer: Any, samples: int = 64) -> str | None:
    """A short hash of entries spread over the weight, by which a file knows the base it was made on; None on the meta device.

    The entries are rounded to bfloat16, so that one checkpoint loaded in bfloat16 and in float32 has one fingerprint.
    """
    weight = layer.weight.detach()
    if weight.is_meta:
        return None
    rows, cols = weight.shape[0], weight[0].numel()
    index = torch.arange(samples, device=weight.device) * (rows * cols - 1) // (samples - 1)
    entries = weight.reshape(rows, cols)[index // cols, index % cols].to(torch.bfloat16).float().cpu().tolist()
    return hashlib.sha256(repr((rows, cols, entries)).encode()).hexdigest()[:16]
