"""Which layers are linear maps, and how each kind holds its matrix: a `Weight` reads the layer as it is at that moment."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .errors import LoraFuncError, listing
from .product import frozen_product
from .variant import Weight


class LinearWeight(Weight):
    """Of a layer with `weight [out_features, in_features]`: `nn.Linear` and what is built like it."""

    inference_only = False  # whether the layer's own kernel has lost its derivative

    def __init__(self, layer: Any):
        self.layer = layer  # Any: nn.Module types each attribute as a tensor or a module

    @property
    def matrix(self) -> Tensor:
        return whole(self.layer, "weight")

    @property
    def shape(self) -> tuple[int, int]:  # of the stored weight, so that a packed one is not unpacked to know it
        d_out, d_in = stored_weight(self.layer).shape
        return d_out, d_in

    @property
    def device(self) -> torch.device:
        weight = stored_weight(self.layer)
        hook = offloading(self.layer) if weight.is_meta else None
        return weight.device if hook is None else torch.device(hook.execution_device)

    @property
    def bias(self) -> Tensor | None:
        return None if self.layer.bias is None else whole(self.layer, "bias")

    def as_stored(self, W: Tensor) -> Tensor:
        """`W [d_out, d_in]` in the layout of the layer's own weight."""
        return W


class Conv1DWeight(LinearWeight):
    """Of transformers' `Conv1D`, GPT-2's linear layer, which holds the transpose."""

    @property
    def matrix(self) -> Tensor:
        return whole(self.layer, "weight").mT

    @property
    def shape(self) -> tuple[int, int]:
        d_in, d_out = stored_weight(self.layer).shape
        return d_out, d_in

    def as_stored(self, W: Tensor) -> Tensor:
        return W.mT


class DequantizedWeight(LinearWeight):
    """Of a layer whose weight is a tensor subclass that packs it and says how to unpack it, as torchao's do."""

    @property
    def matrix(self) -> Tensor:
        return whole(self.layer, "weight").dequantize()

    def __call__(self, z: Tensor) -> Tensor:
        return frozen_product(z, self)


class Packed4bitWeight(LinearWeight):
    """Of bitsandbytes' `Linear4bit`. Its `matrix` is dequantized each time, in the dtype that it had before."""

    @property
    def shape(self) -> tuple[int, int]:
        d_out, d_in = self.state.shape  # not the shape of the packed bytes
        return d_out, d_in

    @property
    def state(self) -> Any:
        """bitsandbytes' QuantState; None where the layer is not quantized yet."""
        state = getattr(self.layer.weight, "quant_state", None)
        return getattr(self.layer, "quant_state", None) if state is None else state

    @property
    def inference_only(self) -> bool:  # pyright: ignore
        # CPUs with AVX512-BF16 repack the bytes at the first forward in eval mode, for a kernel that has no backward
        return getattr(self.state, "packing_format_for_cpu", False)

    @property
    def matrix(self) -> Tensor:
        from bitsandbytes import functional  # noqa: PLC0415  (who has such a layer has it)

        packed, state = self.layer.weight.detach(), self.state
        if self.inference_only:
            # bitsandbytes' inverse writes into the state that it is given, quantizes nested scales once more, and leaves
            # plain ones transposed
            scales = state.absmax.mT.reshape(-1).float()
            state = copy.copy(state)
            state.original_nested = False
            packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, state)
            state.absmax = scales
        return functional.dequantize_4bit(packed, state)

    def __call__(self, z: Tensor) -> Tensor:
        dtype = self.layer.compute_dtype or z.dtype  # as the layer does: its own, else that of its input
        return frozen_product(z.to(dtype), self).to(z.dtype)


class Packed8bitWeight(LinearWeight):
    """Of bitsandbytes' `Linear8bitLt`: int8 rows and their scales, which move from the weight to `layer.state` in a forward.

    The product here is with the dequantized matrix. The layer's own kernel also quantizes its input, in eval mode and always
    on CUDA, and differs from this by 1e-2.
    """

    @property
    def rows_and_scales(self) -> tuple[Tensor | None, Tensor | None]:
        """int8 `[d_out, d_in]` and float32 `[d_out]`, wherever they are; None where the layer is not quantized yet."""
        weight, state = self.layer.weight, self.layer.state
        return (state.CB, state.SCB) if weight.CB is None else (weight.CB, weight.SCB)

    @property
    def matrix(self) -> Tensor:
        from bitsandbytes import functional  # noqa: PLC0415  (who has such a layer has it)

        rows, scales = self.rows_and_scales
        return functional.int8_vectorwise_dequant(rows, scales)  # pyright: ignore  (check_layer has seen to None)

    def __call__(self, z: Tensor) -> Tensor:
        return frozen_product(z, self)


def kind_of(module: nn.Module) -> type[LinearWeight] | None:
    """The kind of linear map that `module` is, told by its structure, or None."""
    computed = computes_weight(module)
    weight = None if computed else getattr(module, "weight", None)
    if type(weight) is nn.Parameter and type(module) is nn.Linear:
        return LinearWeight
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        if type(weight).__name__ == "Params4bit":
            return Packed4bitWeight
        if type(weight).__name__ == "Int8Params":
            return LinearWeight if module.state.has_fp16_weights else Packed8bitWeight  # pyright: ignore
        return DequantizedWeight if is_packed(weight) else LinearWeight
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx"):
        return Conv1DWeight if computed or isinstance(weight, Tensor) else None
    return None


def weight_hooks(module: nn.Module) -> list[Any]:
    """The hooks of torch's old weight_norm, spectral_norm and prune, which set `module.weight` before each forward."""
    return [
        hook
        for hook in module._forward_pre_hooks.values()
        if (isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == "weight")
        or (isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight")
    ]


def computes_weight(module: nn.Module) -> bool:
    """Whether a module computes its weight from other tensors: by `torch.nn.utils.parametrize`, or by a hook."""
    if "weight" in module._parameters:
        return False
    return parametrize.is_parametrized(module, "weight") or bool(weight_hooks(module))


def stored_weight(layer: Any) -> Any:
    """`layer.weight`; where the layer computes it, as its next forward in eval mode would, with nothing written.

    Plain reading would not do: in train mode it moves the vectors of spectral_norm, and what a hook has left there is that
    of the last forward.
    """
    if not computes_weight(layer):
        return getattr(layer, "weight", None)
    hooks = weight_hooks(layer)
    still = stilled(layer) if hooks or any(module.training for module in layer.modules()) else layer
    if not hooks:  # and not by the attribute: `parametrize.cached` would keep the result under the id of a passing copy
        return still.parametrizations["weight"]()
    for hook in hooks:
        hook(still, ())
    return still.weight


def stilled(module: nn.Module) -> Any:
    """A structural copy of a module, in eval mode."""
    twin = object.__new__(type(module))
    children = {name: child and stilled(child) for name, child in module._modules.items()}
    twin.__dict__.update(vars(module), training=False, _modules=children)
    return twin


def is_packed(weight: Any) -> bool:
    """Whether a weight is one of bitsandbytes', or a tensor subclass that knows how to unpack itself."""
    own = isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize
    return own or type(weight).__name__ in ("Params4bit", "Int8Params")


def offloading(module: Any) -> Any:
    """The hook by which accelerate holds the tensors of a module that are on the meta device between its forwards, or None."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((hook for hook in hooks if getattr(hook, "offload", False)), None)


def whole(module: Any, name: str) -> Tensor:
    """The tensor `name` of a module as its forward will see it: read where it is offloaded, gathered where it is sharded.

    A sharded one (a DTensor, as of `fully_shard`) is gathered by all ranks together.
    """
    tensor = stored_weight(module) if name == "weight" else getattr(module, name)
    if tensor.is_meta and (hook := offloading(module)) is not None:
        return hook.weights_map[name].detach().to(hook.execution_device, tensor.dtype)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_offload(model: nn.Module, paths: Iterable[str]) -> None:
    """Raises LoraFuncError where accelerate brings in the weights of a layer from above it, by names that a view changes."""
    for parent, module in model.named_modules():
        if not getattr(offloading(module), "place_submodules", False):
            continue
        if inside := [path for path in paths if not parent or path.startswith(f"{parent}.")]:
            raise LoraFuncError(
                f"accelerate offloads {type(module).__name__} {parent!r} as a whole, with {listing(inside)} in it. Offload it "
                f"layer by layer, without preload_module_classes=[{type(module).__name__!r}], or leave these layers out"
            )


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
    weight, kind = weight_of(layer), type(layer).__name__
    stored = stored_weight(layer)
    if stored is not None and nn.parameter.is_lazy(stored):
        raise LoraFuncError(f"{path!r} is a {kind} without a weight yet: run the model once, then adapt it")
    if (isinstance(weight, Packed4bitWeight) and weight.state is None) or (
        isinstance(weight, Packed8bitWeight) and any(part is None for part in weight.rows_and_scales)
    ):
        raise LoraFuncError(
            f"{path!r} is a {kind} that is not quantized yet: move the model to its device first, then adapt it"
        )
    packed = isinstance(weight, (Packed4bitWeight, Packed8bitWeight))
    readable = isinstance(stored, Tensor) and (packed or (stored.is_floating_point() and stored.dim() == 2))
    if not readable or weight.shape != features(layer):
        given = f"a weight of {stored.dtype} and shape {tuple(stored.shape)}" if isinstance(stored, Tensor) else "no weight"
        raise LoraFuncError(
            f"{path!r} is a {kind} with {given}, where a floating one of shape {features(layer)} was expected; this way of "
            "packing a weight is not supported. Leave it out, as in Targets(exclude=...)"
        )


def fingerprint(layer: Any, samples: int = 64) -> str | None:
    """A short hash of entries spread over the weight, by which a file knows the base it was made on; None on the meta device.

    The entries are rounded to bfloat16, so that one checkpoint loaded in bfloat16 and in float32 has one fingerprint. A packed
    weight is dequantized first: it has another one than the weight that it was made from.
    """
    weight = weight_of(layer)
    if weight.device.type == "meta":
        return None
    matrix = weight.dense().detach()
    rows, cols = matrix.shape
    index = torch.arange(samples, device=matrix.device) * (rows * cols - 1) // (samples - 1)
    entries = matrix[index // cols, index % cols].to(torch.bfloat16).float().cpu().tolist()
    return hashlib.sha256(repr((rows, cols, entries)).encode()).hexdigest()[:16]
