"""Packed weights that say themselves how to unpack them: torchao, HQQ, GPTQ."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .layer import LayerWeight, is_sized, whole
from .product import frozen_product


def unpacks_itself(weight: Any) -> bool:
    """Whether a weight is a tensor subclass with a `dequantize` of its own, as torchao's are."""
    return isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize


class DequantizedWeight(LayerWeight):
    """Of a layer whose weight is a tensor subclass that unpacks itself."""

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
    """Of a layer without a `weight` that unpacks its matrix: HQQ's `HQQLinear`, GPTQModel's.

    HQQ's method returns `[d_out, d_in]`, GPTQModel's `[d_in, d_out]`.
    """

    opaque = True
    METHODS: ClassVar = {"dequantize": False, "dequantize_weight": True}  # -> is it transposed?

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
        matrix = getattr(self.layer, name)().detach()
        return matrix.mT if self.METHODS[name] else matrix

    def problem(self) -> str | None:
        try:
            matrix = self.matrix
        except Exception as error:  # whatever its kernels raise
            return (
                f"whose matrix cannot be unpacked ({type(error).__name__}: {error}). Leave it out"
            )
        return None if tuple(matrix.shape) == self.features else self.misfit(matrix)

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
