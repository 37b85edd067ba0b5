"""accelerate: hooks that keep a layer's tensors elsewhere between its forward passes.

An offloaded layer holds tensors on the device "meta". Its hook brings them in before the forward,
from `weights_map`, and drops them afterwards. accelerate itself is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraFuncError, listing

RELIES_ON = {
    "accelerate.hooks": (
        "AlignDevicesHook.__init__(offload, execution_device, weights_map, place_submodules)",
        "SequentialHook.__init__(hooks)",
        "add_hook_to_module",  # which replaces `forward`
        "source:module._hf_hook",
    )
}


def offloading(module: Any) -> Any:
    """The hook that holds the tensors of an offloaded module, or None."""
    hook = module.__dict__.get("_hf_hook")  # a missing attribute of a module is slow to ask for
    if hook is None:
        return None
    hooks = getattr(hook, "hooks", (hook,))
    return next((hook for hook in hooks if getattr(hook, "offload", False)), None)


def device_of(module: Any, tensor: Tensor) -> torch.device:
    """The device where the module computes with its `tensor`."""
    hook = offloading(module)
    if hook is not None and tensor.is_meta:
        return torch.device(hook.execution_device)
    return tensor.device


def onloaded(module: Any, name: str, tensor: Tensor) -> Tensor:
    """The tensor `name` of a module; if it is offloaded, a copy on the device where it is used."""
    if tensor.is_meta and (hook := offloading(module)) is not None:
        return hook.weights_map[name].detach().to(hook.execution_device, tensor.dtype)
    return tensor


def moved_input(layer: Any, x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, if a hook moves the layer's inputs: it does so for the layer alone."""
    return x.to(device) if x.device != device and hasattr(layer, "_hf_hook") else x


def check_offload(model: nn.Module, paths: Iterable[str]) -> None:
    """Raises LoraFuncError if accelerate offloads a block with target layers as a whole.

    Then it finds the weights by names relative to the block, which a view changes.
    """
    for parent, module in model.named_modules():
        if not getattr(offloading(module), "place_submodules", False):
            continue
        if inside := [path for path in paths if not parent or path.startswith(f"{parent}.")]:
            kind = type(module).__name__
            raise LoraFuncError(
                f"accelerate offloads {kind} {parent!r} as a whole, with {listing(inside)} in it. "
                f"Offload it layer by layer, without preload_module_classes=[{kind!r}], or leave "
                "these layers out"
            )
