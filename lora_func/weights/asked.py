"""What a layer computes that holds its weight as nn.Linear does and has a forward of its own.

The layer itself is asked. It may compute x Wᵀ + b in another way (Falcon), x W + b, or something
that adapters would take for one of these: routers return tuples, BitNet rescales its weight.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..libraries import torch_hooks
from .layer import LayerWeight, TransposedWeight, whole

ROWS = 4
TOLERANCE = 0.02  # bfloat16 rounds by 0.4 %, a layer that quantizes its input to 8 bits by 1 %


def asked(layer: Any) -> LayerWeight | str:
    """The weight of a layer, upright or transposed as the layer uses it; or what is wrong with it.

    Where the forward is that of its class, a copy of the layer answers with another weight, since
    its own may be zero or symmetric. That weight is the outer product of two vectors: quick to
    make, and for a layer that is linear in its weight and in its input, as good as any. Where the
    forward was set on the layer, the copy answers with its own weight: what sets it may quantize,
    and its scales fit no other.
    """
    weight = LayerWeight(layer)
    if type(layer).forward is not nn.Linear.forward:
        m, n = torch_hooks.stored_weight(layer).shape
        W = torch.outer(irregular(layer, 0.732, m), irregular(layer, 0.236, n))
        answer = ask(layer, type(layer).forward, {"weight": W})
        if isinstance(answer, str):
            return answer
        weight = answer(layer)
    forward = vars(layer).get("forward")
    if isinstance(forward, types.MethodType) and forward.__self__ is layer:
        answer = ask(layer, forward.__func__, {})
        if isinstance(answer, str):
            return answer
    return weight


def ask(
    layer: Any, forward: Callable[..., Any], tensors: dict[str, Tensor]
) -> type[LayerWeight] | str:
    """How a forward uses the weight of a layer, or why it is not the product with it.

    It runs on a copy in eval mode, on a few rows, with `tensors` in the place of the layer's own.
    """
    d_out, d_in = LayerWeight(layer).features
    x, b = irregular(layer, 0.618, ROWS, d_in), irregular(layer, 0.414, d_out)
    biased = isinstance(getattr(layer, "bias", None), Tensor)
    held = tensors | ({"bias": b} if biased else {})
    rest = [name for name, t in layer._parameters.items() if t is not None and name not in held]
    try:
        with torch.no_grad():
            twin = torch_hooks.holding(layer, {name: whole(layer, name) for name in rest} | held)
            y, W = forward(twin, x), twin.weight
    except Exception as error:  # whatever the layer raises for plain rows
        return (
            f", and whether it computes x Wᵀ + b cannot be told: {ROWS} rows of {d_in} numbers "
            f"raise {type(error).__name__}: {error}"
        )
    if not isinstance(y, Tensor) or y.shape != (ROWS, d_out):
        given = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        return f", whose forward returns {given} for {ROWS} rows of {d_in} numbers, not x Wᵀ + b"
    if y.is_meta:  # the model has no data yet; `init` and `load` ask again
        return LayerWeight if W.shape == (d_out, d_in) else TransposedWeight
    closest: tuple[float, type[LayerWeight]] = float("inf"), LayerWeight
    for way, M in ((LayerWeight, W.mT), (TransposedWeight, W)):
        if M.shape == (d_in, d_out):
            expected = x @ M + (b if biased else 0)
            error, size = (y - expected).float().norm().item(), expected.float().norm().item()
            off = error / size if error else 0.0
            closest = min(closest, (off, way), key=lambda found: found[0])
    if closest[0] <= TOLERANCE:
        return closest[1]
    return (
        f", whose forward computes something else than x Wᵀ + b: its output is {closest[0]:.0%} off"
    )


def irregular(layer: Any, seed: float, *shape: int) -> Tensor:
    """Numbers in -1 .. 1 for a layer, without a random generator, which vmap would not let run."""
    dtype = torch_hooks.stored_weight(layer).dtype
    steps = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64, device="cpu")
    return (seed * steps**2).sin().reshape(shape).to(LayerWeight(layer).device, dtype)
