"""torch.nn: layers that compute their weight, modules that bypass a layer, convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import LoraFuncError

RELIES_ON = {
    "torch.nn.modules.module": (  # the text, because torch.compile puts another `__init__` there
        'source:super().__setattr__("_buffers"',
        'source:super().__setattr__("_forward_pre_hooks"',
        'source:super().__setattr__("_modules"',
        'source:super().__setattr__("_parameters"',
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    ),
    "torch.nn.utils.parametrize": (
        "_cache_enabled",
        "is_parametrized",
        "source:hasattr(self, str(curr_idx))",
        "source:module.parametrizations[",
    ),
    "torch.nn.utils.prune": ("source:_tensor_name",),
    "torch.nn.utils.spectral_norm": ("source:self.name = name", "source:def __call__(self, module"),
    "torch.nn.utils.weight_norm": ("source:self.name = name", "source:def __call__(self, module"),
    "torch.nn.modules.transformer": ("source:activation_relu_or_gelu",),
    "torch.nn.modules.rnn": (
        "source:self._flat_weights_names",
        "source:self._flat_weight_refs",
        "source:weight is not None and ref is not None",
        "source:_VF.lstm(",
        "source:self._flat_weights,",
        "RNNBase.flatten_parameters",
    ),
    "torch.nn.modules.conv": ("_ConvNd", "_ConvTransposeNd"),
    "torch.nn.modules.batchnorm": ("_NormBase", "source:track_running_stats"),
}

# Hooks of all modules.
GLOBAL_HOOKS = (
    modules._global_forward_hooks,
    modules._global_forward_pre_hooks,
    modules._global_backward_hooks,
    modules._global_backward_pre_hooks,
)


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

    It writes nothing. Reading the attribute can: in train mode it moves the vectors of
    spectral_norm. And with a hook, the attribute is the weight of the last forward.
    """
    if not computes_weight(layer):
        return getattr(layer, "weight", None)
    hooks = weight_hooks(layer)
    training = any(module.training for module in layer.modules())
    still = stilled(layer) if hooks or training else layer
    if not hooks:
        # Not by the attribute: `parametrize.cached` would keep it under the id of a copy.
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


def holding(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """A structural copy of a layer, in eval mode, that holds other tensors where it has some.

    Its buffers and containers are its own too, so its forward writes to nothing of the layer.
    """
    twin = stilled(layer)
    for module in twin.modules():
        for name, value in vars(module).items():
            if type(value) in (list, dict, set):
                module.__dict__[name] = value.copy()
        buffers = {name: b if b is None else b.clone() for name, b in module._buffers.items()}
        module.__dict__["_buffers"] = buffers
    twin.__dict__["_parameters"] = dict(layer._parameters)
    for name, tensor in tensors.items():
        if getattr(layer, name, None) is not None:
            homes = twin._parameters, twin._buffers
            next((home for home in homes if name in home), twin.__dict__)[name] = tensor
    return twin


def caching_weights() -> bool:
    """Whether `parametrize.cached()` is on: it keeps computed weights by the id of their module."""
    return bool(parametrize._cache_enabled)


def check_cache(module: nn.Module, path: str) -> None:
    """Raises LoraFuncError inside `parametrize.cached()`, for a module that it applies to."""
    if caching_weights() and parametrize.is_parametrized(module):
        raise LoraFuncError(
            "torch.nn.utils.parametrize.cached() keeps weights by the id of their module, but in "
            f"a call {path!r} is a copy that is gone afterwards. Leave cached(), or freeze the "
            "model with requires_grad_(False)"
        )


def without_fused_path(module: nn.Module) -> dict[str, Any]:
    """Attributes for a copy of `module` that switch off a path which never calls its layers.

    In eval mode nn.TransformerEncoderLayer hands the weights of linear1 and linear2 to a kernel.
    """
    return {"activation_relu_or_gelu": 0} if isinstance(module, nn.TransformerEncoderLayer) else {}


def runs_children(module: nn.Module) -> bool:
    """Whether a module is a container: its children are counted, and called one after the other.

    Of a ParametrizationList, which is one too, torch asks for each by its number.
    """
    containers = nn.Sequential, nn.ModuleList, nn.ModuleDict
    return isinstance(module, containers) and not isinstance(
        module, parametrize.ParametrizationList
    )


LISTS = ("_flat_weights", "_flat_weight_refs")  # in which an nn.LSTM keeps its parameters too


def without_lists(module: nn.Module) -> dict[str, Any]:
    """Attributes for a copy of `module` whose class is to have `lists_made`."""
    return {name: [] for name in LISTS} if isinstance(module, nn.RNNBase) else {}


def lists_made(kind: type[nn.Module]) -> dict[str, Any]:
    """For a subclass of `kind`: the lists of an nn.LSTM and its kin, made from its attributes.

    Without references to look at, it takes them for up to date. Its weights cannot lie in one
    piece of memory, so cuDNN copies them there in each call, and flattening them does nothing.
    """
    if not issubclass(kind, nn.RNNBase):
        return {}

    def listed(name: str, item: Callable[[Any, str], Any]) -> property:
        return property(
            lambda module: [item(module, weight) for weight in module._flat_weights_names],
            lambda module, _: module.__dict__.update({name: []}),  # torch's own lists are not kept
        )

    weights, references = LISTS
    return {
        weights: listed(weights, getattr),
        references: listed(references, lambda module, weight: None),
        "flatten_parameters": lambda module: None,
    }


def is_stateless(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers, such as nn.Linear, without parts or hooks."""
    own = type(module).__module__.startswith("torch.nn.modules.")
    parts = module._modules or module._buffers
    return own and not (parts or module._forward_hooks or module._forward_pre_hooks)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether to call a module is to compute `F.linear` with its two parameters, and no more.

    Not so with hooks, with a weight or bias that is another attribute than a parameter, and where a
    library has put its own `forward` on the module or on nn.Linear itself.
    """
    own = module._parameters
    return type(module) is nn.Linear and "weight" in own and "bias" in own and runs_bare(module)


def runs_bare(module: nn.Module) -> bool:
    """Whether to call a module is to call the forward that its class was written with."""
    kind = type(module)
    own = "forward" not in module.__dict__ and kind.forward.__module__ == kind.__module__
    return own and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(GLOBAL_HOOKS)
    )


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is one of torch's convolutions, of any number of axes."""
    return isinstance(module, _ConvNd)


def is_transposed_convolution(module: nn.Module) -> bool:
    """Whether its kernel is `[in, out, k, ..]`."""
    return isinstance(module, _ConvTransposeNd)


def writes_buffers(module: nn.Module) -> bool:
    """Whether the forward of a module updates statistics in train mode."""
    return isinstance(module, _NormBase) and module.track_running_stats


def uncalled_layers(model: nn.Module) -> dict[str, str]:
    """path -> class of the parent, for linear layers whose parent never calls them."""
    return {
        f"{path}.out_proj".lstrip("."): type(module).__name__
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
