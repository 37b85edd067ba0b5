"""torch.autocast: whether it is on at all."""

from __future__ import annotations

import torch

RELIES_ON = {"torch._C": ("_is_any_autocast_enabled",)}


def anywhere() -> bool:
    """Whether autocast is on for any device. A tenth of the time of asking for one."""
    return torch._C._is_any_autocast_enabled()  # pyright: ignore  (compiled)
