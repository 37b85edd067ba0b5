"""torch.nn: layers that compute their weight, and modules that read a weight without calling."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import LoraFuncError

RELIES_ON = {
    "torch.nn": ("Module.__init__(_forward_pre_hooks, _modules, _parameters)",),
    "torch.nn.utils.parametrize": ("_cache_enabled", "is_parametrized"),
    "torch.nn.utils.prune": ("source:_tensor_name",),
    "torch.nn.utils.spectral_norm": ("SpectralNorm.__call__", "source:self.name = name"),
    "torch.nn.utils.weight_norm": ("WeightNorm.__call__", "source:self.name = name"),
    "torch.nn.modules.transformer": ("source:activation_relu_or_gelu",),
}


def weight_hooks(module: nn.Module) -> list[Any]:
    """Hooks of the older weight_norm, spectral_norm and prune: they set `weight` in a forward."""
    return [
        hook
        for hook in module._forward_pre_hooks.values()
        if (isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == "weight")
        or (isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight")
    ]


def computes_weight(module: nn.Module) -> bool:
    """Whether a module computes its weight from other tensors, by a parametrization or a hook."""
    if "weight" in module._parameters:
        return False
    return parametrize.is_parametrized(module, "weight") or bool(weight_hooks(module))


def stored_weight(layer: Any) -> Any:
    """`layer.weight`; if the layer computes it, as its next forward in eval mode would.

    Writes nothing. Plain reading would: in train mode it moves the vectors of spectral_norm. And
    what a hook left on the layer is the weight of the last forward.
    """
    if not computes_weight(layer):
        return getattr(layer, "weight", None)
    hooks = weight_hooks(layer)
    training = any(module.training for module in layer.modules())
    still = stilled(layer) if hooks or training else layer
    if not hooks:
        # Not by the attribute: `parametrize.cached` would keep it under the id of a passing copy.
        return still.parametrizations["weight"]()
    for hook in hooks:
        hook(still, ())
    return still.weight


def stilled(module: nn.Module) -> Any:
    """A structural copy of a module, in eval mode. It shares all tensors."""
    twin = object.__new__(type(module))
    children = {name: child and stilled(child) for name, child in module._modules.items()}
    twin.__dict__.update(vars(module), training=False, _modules=children)
    return twin


def check_cache(module: nn.Module, path: str) -> None:
    """Raises LoraFuncError inside `parametrize.cached()`, for a module that it applies to."""
    if parametrize._cache_enabled and parametrize.is_parametrized(module):
        raise LoraFuncError(
            "torch.nn.utils.parametrize.cached() keeps weights by the id of their module, and in "
            f"a call {path!r} is a passing copy. Leave cached(), or freeze the model with "
            "requires_grad_(False)"
        )


def without_fused_path(module: nn.Module) -> dict[str, Any]:
    """Attributes for a copy of `module` that switch off a path which never calls its layers.

    In eval mode nn.TransformerEncoderLayer hands the weights of linear1 and linear2 to a kernel.
    """
    return {"activation_relu_or_gelu": 0} if isinstance(module, nn.TransformerEncoderLayer) else {}


def uncalled_layers(model: nn.Module) -> dict[str, str]:
    """path -> class of the parent, for linear layers whose parent never calls them."""
    return {
        f"{path}.out_proj".lstrip("."): type(module).__name__
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
