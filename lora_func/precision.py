"""Which dtype a computation runs in, whatever autocast says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .libraries.autocast import anywhere

P = ParamSpec("P")
R = TypeVar("R")


def at_least_float32(t: Tensor) -> Tensor:
    """`t` in float32, or unchanged if it is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for `device`."""
    if not anywhere():  # which is cheap to ask, and each layer asks
        return False
    return torch.is_autocast_enabled("cpu" if device.type == "meta" else device.type)


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switches autocast off for `device`. If it is off already, entering costs nothing."""
    if autocast_on(device):
        return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def no_inference_mode() -> Iterator[None]:
    """Switches inference mode off, and gradients stay off: its tensors serve nowhere else."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` with autocast off: it would round norms, Gram matrices and solves."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        with autocast_off(device):
            return function(*args, **kwargs)

    return run
