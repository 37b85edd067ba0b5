"""On which CUDA stream a computation runs."""

from __future__ import annotations

import torch
from torch import Tensor

# A build of PyTorch for CPUs does not have it. Its own users name it.
RELIES_ON = {"torch._dynamo.device_interface": ("source:_cuda_getCurrentRawStream",)}


def on_side_stream(t: Tensor) -> bool:
    """Whether the current stream of a tensor's GPU is another than the default one.

    CUDA graphs are recorded on other streams, and the steps before a recording run there too, as
    PyTorch's guide says. This takes 0.2 us, and the same through `torch.cuda.current_stream` 2 us.
    """
    return torch._C._cuda_getCurrentRawStream(t.device.index) != 0  # pyright: ignore  (compiled)
