"""Packed weights with a method that unpacks them: torchao, HQQ, GPTQ."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import LoraFuncError
from .layer import LayerWeight, is_sized, whole
from .product import frozen_product


def unpacks_itself(weight: Any) -> bool:
    """Whether a weight is a tensor subclass with a `dequantize` of its own, as torchao's are."""
    return isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize


class DequantizedWeight(LayerWeight):
    """The weight of a layer that stores it as a tensor subclass with a `dequantize`."""

    opaque = True

    @classmethod
    def matches(cls, layer: Any) -> bool:
        return is_sized(layer) and unpacks_itself(layer._parameters.get("weight"))

    @property
    def matrix(self) -> Tensor:
        return whole(self.layer, "weight").dequantize()

    def __call__(self, z: Tensor) -> Tensor:
        return frozen_product(z, self)


class DequantizingLayer(LayerWeight):
    """The weight of a layer without a `weight`, but with a method that unpacks its matrix.

    HQQ's `HQQLinear` has `dequantize`, GPTQModel's layers have `dequantize_weight`. GPTQModel's
    return `[d_in, d_out]`, all others `[d_out, d_in]`.
    """

    opaque = True
    METHODS: ClassVar = ("dequantize", "dequantize_weight")

    @classmethod
    def matches(cls, layer: Any) -> bool:
        return (
            is_sized(layer)
            and layer._parameters.get("weight") is None
            and any(callable(getattr(type(layer), name, None)) for name in cls.METHODS)
        )

    @property
    def matrix(self) -> Tensor:
        kind = type(self.layer)
        name = next(name for name in self.METHODS if callable(getattr(kind, name, None)))
        try:
            matrix = getattr(self.layer, name)().detach()
        except Exception as error:  # whatever its kernels raise
            raise LoraFuncError(
                f"the matrix of a {kind.__name__} cannot be unpacked ({type(error).__name__}: "
                f"{error}). Leave the layer out, as in Targets(exclude=...)"
            ) from error
        if any(base.__module__.startswith("gptqmodel.") for base in kind.__mro__):
            matrix = matrix.mT
        if tuple(matrix.shape) != self.features:
            raise LoraFuncError(f"a {kind.__name__} {self.misfit(matrix)}")
        return matrix

    def problem(self) -> None:  # `matrix` raises: to look for one here would unpack it once more
        return None

    @property
    def shape(self) -> tuple[int, int]:
        return self.features

    @property
    def device(self) -> torch.device:
        tensors = [*self.layer.parameters(), *self.layer.buffers()]
        return tensors[0].device if tensors else self.matrix.device

    @property
    def input_dtype(self) -> None:
        return None

    @property
    def at_hand(self) -> bool:
        return True

    def __call__(self, z: Tensor) -> Tensor:
        return frozen_product(z, self)
