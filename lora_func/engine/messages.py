"""What a call says about a model that it cannot run through."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import listing, near_misses
from ..libraries import accelerate


def explained(error: RuntimeError, model: nn.Module) -> str | None:
    """What to do about an error of torch inside a view; None for an error of another kind."""
    if "saved tensor hooks" in str(error):
        return (
            "torch.func.grad and vjp cannot run through activation checkpointing, nor through "
            "anything else that packs saved tensors. Use lf.value_and_grad or plain autograd "
            "outside of transforms, or switch it off (gradient_checkpointing_disable)"
        )
    offloaded = any(accelerate.offloading(module) for module in model.modules())
    if "data pointer" in str(error) and offloaded:
        return (
            "torch.func transforms cannot run through weights that accelerate offloads to the "
            "disk. Use lf.value_and_grad or plain autograd outside of transforms, or offload to "
            "the CPU"
        )
    return None


def missing_modules(model: nn.Module, missing: Sequence[str]) -> str:
    """The message for a model without some of the targets."""
    paths = [path for path, _ in model.named_modules()]
    hint = near_misses(missing[0], paths)
    return f"{type(model).__name__} has no layer {listing(missing)}.{hint}"


def missing_parameter(model: nn.Module, path: str) -> str:
    """The message for a model without one of the parameters."""
    hint = near_misses(path, [name for name, _ in model.named_parameters()])
    return f"{type(model).__name__} has no parameter {path!r}.{hint}"
