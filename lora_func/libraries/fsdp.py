"""FSDP2: parameters that are sharded over ranks, as DTensors. And FSDP's first version."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import LoraFuncError

RELIES_ON = {
    "torch.distributed.tensor": ("DTensor.full_tensor",),
    "torch.distributed.fsdp": ("FullyShardedDataParallel",),
}

PLAIN = (Tensor, nn.Parameter)  # a missing attribute is slow to ask for


def is_first_version(module: Any) -> bool:
    """Whether a module is a wrapper of FSDP's first version, which flattens parameters."""
    return any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return type(tensor) not in PLAIN and hasattr(tensor, "full_tensor")


def gathered(tensor: Any) -> Tensor:
    """The whole of a tensor. All ranks gather a sharded one together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def check_frozen(parameter: Any, path: str) -> None:
    """Raises LoraFuncError for a sharded parameter that requires grad, of the module at `path`.

    `fully_shard` gathers into modules of its own, and not into the copies in a view.
    """
    if is_sharded(parameter):
        raise LoraFuncError(
            f"the parameters of {path!r} are sharded and require grad. Freeze the base, "
            "model.requires_grad_(False), before fully_shard"
        )
