"""torch.func and autograd: whether a transform or a backward runs, and what a vmap batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore  (compiled)
    is_batchedtensor,
    peek_interpreter_stack,
)
from torch.autograd import forward_ad

RELIES_ON = {
    "torch._C._functorch": ("is_batchedtensor", "peek_interpreter_stack"),
    "torch.autograd.forward_ad": ("_current_level",),
    "torch._C": ("_current_graph_task_id",),
}


def in_transform() -> bool:
    """Whether a torch.func transform runs in this thread, or forward-mode autograd in any."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_batched(t: Tensor) -> bool:
    """Whether `t` is batched by a torch.vmap that is running."""
    return is_batchedtensor(t)


def in_backward() -> bool:
    """Whether a backward pass of autograd runs in this thread."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore  (compiled)
