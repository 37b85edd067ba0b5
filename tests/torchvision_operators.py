"""torchvision beside a torch without CUDA: what imports it here uses no operator of it.

PyPI's torchvision for Linux is built for CUDA. Beside a torch without CUDA its library of operators
does not load, and the import fails at the first operator that torchvision describes. Parts of
transformers and diffusers then fail to import, too. It is enough to declare these operators.
"""

from __future__ import annotations

import torch

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # declarations live as long as this

try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    if "operator torchvision::nms does not exist" not in str(error):
        raise
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
