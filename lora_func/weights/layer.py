"""The `Weight` of a layer, read from the layer at the moment of asking."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..libraries import accelerate, fsdp, torch_hooks, transformers
from ..variant import Weight


class LayerWeight(Weight):
    """The weight of `nn.Linear`, and of layers with a `weight [out_features, in_features]` like it.

    A new way of holding a matrix is a subclass, and a line in `table.KINDS`.
    """

    def __init__(self, layer: Any):
        self.layer = layer  # Any: nn.Module types each attribute as a tensor or a module

    @classmethod
    def matches(cls, layer: Any) -> bool:
        """Whether a layer holds its matrix in this way."""
        return is_sized(layer)

    def problem(self) -> str | None:
        """Why the matrix cannot be read, as the rest of "'path' is a Linear ..", or None."""
        stored = torch_hooks.stored_weight(self.layer)
        if isinstance(stored, Tensor) and nn.parameter.is_lazy(stored):
            return "without a weight yet: run the model once, then adapt it"
        floating = isinstance(stored, Tensor) and stored.is_floating_point() and stored.dim() == 2
        if floating and stored.dtype.itemsize > 1 and not is_sparse(stored):  # float8 has scales
            return None if self.shape == self.features else self.misfit(stored)
        return self.misfit(stored)

    def misfit(self, stored: Any) -> str:
        """The problem of a stored tensor that is not the expected matrix."""
        given = "no weight"
        if isinstance(stored, Tensor):
            sparse = "sparse " * is_sparse(stored)
            given = f"a {sparse}weight of {stored.dtype} and shape {tuple(stored.shape)}"
        return (
            f"with {given}, where a floating one of shape {self.features} was expected; this way "
            "of packing a weight is not supported. Leave it out, as in Targets(exclude=...)"
        )

    @property
    def features(self) -> tuple[int, int]:
        """`(d_out, d_in)`, as the layer declares them."""
        return self.layer.out_features, self.layer.in_features

    @property
    def matrix(self) -> Tensor:  # pyright: ignore  (an attribute of a plain Weight)
        return whole(self.layer, "weight")

    @property
    def shape(self) -> tuple[int, int]:  # of the stored tensor: nothing is unpacked to know it
        d_out, d_in = torch_hooks.stored_weight(self.layer).shape
        return d_out, d_in

    @property
    def device(self) -> torch.device:
        return accelerate.device_of(self.layer, torch_hooks.stored_weight(self.layer))

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore
        bias = getattr(self.layer, "bias", None)
        return None if bias is None else whole(self.layer, "bias")

    @property
    def input_dtype(self) -> torch.dtype | None:
        return torch_hooks.stored_weight(self.layer).dtype

    @property
    def at_hand(self) -> bool:
        """Whether reading the matrix moves nothing between devices or ranks."""
        stored = torch_hooks.stored_weight(self.layer)
        return not fsdp.is_sharded(stored) and accelerate.offloading(self.layer) is None

    @property
    def inference_only(self) -> bool:
        """Whether the layer's own kernel has lost its derivative."""
        return False

    def as_stored(self, W: Tensor) -> Tensor:
        """`W [d_out, d_in]` in the layout of the layer's own weight."""
        return W

    def to_fuse(self, x: Tensor) -> Tensor | LayerWeight | None:
        """The matrix, if all that the layer does to `x` is its product with it (and its bias).

        As the layer's own tensor, or else as what has `layer_output`; see `fused.low_rank_linear`.
        """
        if not self.is_bare():
            return None
        W = self.layer._parameters["weight"]
        return W if W.dtype == x.dtype and W.device == x.device else None

    def is_bare(self) -> bool:
        """Whether all that the layer does to an input like its matrix is the product with it."""
        if not torch_hooks.is_plain_linear(self.layer):
            return False
        W = self.layer._parameters["weight"]
        return type(W) in (Tensor, nn.Parameter) and not W.requires_grad


class TransposedWeight(LayerWeight):
    """The weight of a layer that holds `[in, out]` and computes `x @ weight`."""

    @property
    def matrix(self) -> Tensor:
        return whole(self.layer, "weight").mT

    @property
    def shape(self) -> tuple[int, int]:
        d_in, d_out = torch_hooks.stored_weight(self.layer).shape
        return d_out, d_in

    def as_stored(self, W: Tensor) -> Tensor:
        return W.mT


class Conv1DWeight(TransposedWeight):
    """The weight of transformers' `Conv1D`, GPT-2's linear layer."""

    @classmethod
    def matches(cls, layer: Any) -> bool:
        return transformers.is_conv1d(layer)

    @property
    def features(self) -> tuple[int, int]:
        return self.layer.nf, self.layer.nx


def is_sparse(stored: Tensor) -> bool:
    """Whether a tensor holds only some of its entries."""
    semi = isinstance(stored, torch.sparse.SparseSemiStructuredTensor)
    return semi or stored.layout is not torch.strided


def is_sized(layer: Any) -> bool:
    """Whether a layer declares the sizes of a linear map."""
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return all(isinstance(size, int) for size in sizes)


def whole(module: Any, name: str) -> Tensor:
    """The tensor `name` of a module as its forward will see it, offloaded or sharded or computed.

    All ranks read a sharded one together.
    """
    tensor = torch_hooks.stored_weight(module) if name == "weight" else getattr(module, name)
    return fsdp.gathered(accelerate.onloaded(module, name, tensor))
