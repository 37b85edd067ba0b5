"""torch.func: whether a transform is running, and which tensors it batches."""

from __future__ import annotations

from torch import Tensor
from torch._C._functorch import (  # pyright: ignore  (compiled)
    is_batchedtensor,
    peek_interpreter_stack,
)
from torch.autograd import forward_ad

RELIES_ON = {
    "torch._C._functorch": ("is_batchedtensor", "peek_interpreter_stack"),
    "torch.autograd.forward_ad": ("_current_level",),
}


def in_transform() -> bool:
    """Whether a torch.func transform runs in this thread, or forward-mode autograd in any."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_batched(t: Tensor) -> bool:
    """Whether `t` is batched by a torch.vmap that is running."""
    return is_batchedtensor(t)
