"""bitsandbytes: 4-bit and 8-bit layers. It is imported only if a model has such a layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..libraries import torch_hooks
from .layer import LayerWeight
from .product import frozen_product

RELIES_ON = {
    "bitsandbytes.functional": (
        "dequantize_4bit",
        "int8_vectorwise_dequant",
        "_convert_weight_packed_for_cpu_inverse",
        "source:packing_format_for_cpu",
        "QuantState.__init__(absmax, shape)",
    ),
    "bitsandbytes.nn": ("Params4bit", "Int8Params", "Linear4bit", "Linear8bitLt"),
    "bitsandbytes.nn.modules": ("source:compute_dtype", "source:self.state"),
    "bitsandbytes.autograd._functions": ("source:CB", "source:SCB", "source:has_fp16_weights"),
}
UNQUANTIZED = "that is not quantized yet: move the model to its device first, then adapt it"


def kind_of_weight(layer: Any) -> str:
    """The class name of a layer's weight."""
    return type(layer._parameters.get("weight")).__name__


class Packed4bitWeight(LayerWeight):
    """The weight of `Linear4bit`, dequantized at each use to the dtype that it was packed from."""

    opaque = True

    @classmethod
    def matches(cls, layer: Any) -> bool:
        return kind_of_weight(layer) == "Params4bit"

    def problem(self) -> str | None:
        if self.state is None:
            return UNQUANTIZED
        return None if self.shape == self.features else self.misfit(self.layer.weight)

    @property
    def shape(self) -> tuple[int, int]:
        d_out, d_in = self.state.shape  # not the shape of the packed bytes
        return d_out, d_in

    @property
    def state(self) -> Any:
        """bitsandbytes' QuantState; None if the layer is not quantized yet."""
        state = getattr(self.layer.weight, "quant_state", None)
        return getattr(self.layer, "quant_state", None) if state is None else state

    @property
    def input_dtype(self) -> None:
        return None

    @property
    def inference_only(self) -> bool:
        # In eval mode, CPUs with AVX512-BF16 repack the bytes for a kernel without a backward.
        return getattr(self.state, "packing_format_for_cpu", False)

    @property
    def matrix(self) -> Tensor:
        # Who has such a layer has bitsandbytes. Without it, pyright takes its name for this module.
        from bitsandbytes import functional  # noqa: PLC0415  # pyright: ignore[reportAttributeAccessIssue]

        packed, state = self.layer.weight.detach(), self.state
        if self.inference_only:
            # bitsandbytes' inverse writes into the state that it is given, quantizes nested
            # scales once more, and leaves plain ones transposed.
            scales = state.absmax.mT.reshape(-1).float()
            state = copy.copy(state)
            state.original_nested = False
            packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, state)
            state.absmax = scales
        return functional.dequantize_4bit(packed, state)

    def to_fuse(self, x: Tensor) -> Packed4bitWeight | None:
        if not (torch.is_grad_enabled() and self.is_bare()):
            return None  # without gradients the layer has kernels of its own for a few rows
        layer = self.layer
        alike = layer.compute_dtype in (None, x.dtype) and layer.weight.device == x.device
        return self if alike else None

    def is_bare(self) -> bool:
        bare = type(self.layer).__name__ == "Linear4bit" and torch_hooks.runs_bare(self.layer)
        return bare and not self.inference_only

    def layer_output(self, x: Tensor) -> Tensor:
        """What the layer itself computes."""
        return self.layer(x)

    def __call__(self, z: Tensor) -> Tensor:
        dtype = self.layer.compute_dtype or z.dtype  # as the layer: its own, or that of its input
        return frozen_product(z.to(dtype), self).to(z.dtype)


class Float8bitWeight(LayerWeight):
    """The weight of `Linear8bitLt(has_fp16_weights=True)`: a float matrix.

    The layer quantizes it in every forward.
    """

    opaque = True

    @classmethod
    def matches(cls, layer: Any) -> bool:
        return kind_of_weight(layer) == "Int8Params" and layer.state.has_fp16_weights


class Packed8bitWeight(LayerWeight):
    """The weight of `Linear8bitLt`: int8 rows and their scales.

    The product here is with the dequantized matrix. The layer's own kernel also quantizes its
    input, in eval mode and always on CUDA, and differs from this one by 1e-2.
    """

    opaque = True

    @classmethod
    def matches(cls, layer: Any) -> bool:
        return kind_of_weight(layer) == "Int8Params" and not layer.state.has_fp16_weights

    def problem(self) -> str | None:
        if any(part is None for part in self.rows_and_scales):
            return UNQUANTIZED
        return None if self.shape == self.features else self.misfit(self.layer.weight)

    @property
    def rows_and_scales(self) -> tuple[Tensor | None, Tensor | None]:
        """int8 `[d_out, d_in]` and float32 `[d_out]`; None if the layer is not quantized yet.

        The first forward moves both from the weight to `layer.state`.
        """
        weight, state = self.layer.weight, self.layer.state
        return (state.CB, state.SCB) if weight.CB is None else (weight.CB, weight.SCB)

    @property
    def input_dtype(self) -> None:
        return None

    @property
    def matrix(self) -> Tensor:
        from bitsandbytes import functional  # noqa: PLC0415  # pyright: ignore[reportAttributeAccessIssue]

        rows, scales = self.rows_and_scales
        return functional.int8_vectorwise_dequant(rows, scales)  # pyright: ignore

    def __call__(self, z: Tensor) -> Tensor:
        return frozen_product(z, self)
