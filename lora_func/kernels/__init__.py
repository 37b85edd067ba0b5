"""Triton kernels for GPUs, and which tensors they take. Everything works without them.

`programs` imports Triton, so it is imported only by who has such tensors. PyTorch for GPUs brings
Triton along.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor, nn

from ..libraries.functorch import in_transform

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes(*tensors: Tensor) -> bool:
    """Whether `programs` may work on these tensors: plain ones on a GPU, of one dtype."""
    first = tensors[0]
    if not first.is_cuda or torch.compiler.is_compiling() or in_transform():
        return False
    for t in tensors:
        plain = type(t) in (Tensor, nn.Parameter) and t.is_contiguous()
        if not plain or t.dtype != first.dtype or t.device != first.device:
            return False
    return first.dtype in DTYPES and first.numel() > 0 and works()


@functools.cache
def works() -> bool:
    """Whether Triton is there, and finds the compiler that it needs."""
    if importlib.util.find_spec("triton") is None:
        return False
    from . import programs  # noqa: PLC0415

    try:
        one = torch.ones(2, 1, 16, device="cuda")
        programs.gate_backward(one, programs.gate(one, one), one)
        programs.add_low_rank(*4 * (torch.ones(1, 16, device="cuda"),), scale=1.0)
    except Exception:  # whatever its compilers raise. PyTorch computes the same
        return False
    return True
