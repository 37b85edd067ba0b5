"""What a call prepares before the model runs: the parameters of all layers, rounded together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..libraries.functorch import copy_together, in_transform
from .layer import AdaptedLayer


def prepare_ahead(layers: Sequence[AdaptedLayer]) -> None:
    """Gives each layer its prepared parameters for the whole call.

    One kernel rounds those of all layers to the dtype of their inputs. Layer by layer, hundreds of
    small ones would run before the model has its first.
    """
    together = not (in_transform() or torch.compiler.is_compiling())
    # Constants apart from leaves: of one function, all outputs would require grad.
    waiting: dict[Any, list[tuple[dict[str, Tensor], str]]] = defaultdict(list)
    for layer in layers:
        entries, dtype = layer.prepare_ahead(together)
        if dtype is None:
            continue
        for name, t in entries.params.items():
            if t.dtype != dtype and t.is_floating_point():
                waiting[t.device, t.dtype, t.requires_grad, dtype].append((entries.params, name))
    for (*_, dtype), places in waiting.items():
        rounded = RoundTogether.apply(dtype, *(params[name] for params, name in places))
        for (params, name), t in zip(places, rounded):
            params[name] = t


class RoundTogether(torch.autograd.Function):
    """Tensors of one dtype and device in another dtype, as parts of one buffer."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor):  # pyright: ignore
        ctx.set_materialize_grads(False)  # what the model does not use has no gradient, not zeros
        ctx.dtype = tensors[0].dtype
        return tuple(copies(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):  # pyright: ignore
        there = [grad for grad in grads if grad is not None]
        if torch.is_grad_enabled():  # with create_graph
            found = iter([grad.to(ctx.dtype) for grad in there])
        else:
            found = iter(copies(there, ctx.dtype))
        return None, *(None if grad is None else next(found) for grad in grads)


ALIGNED = 64  # so many entries of any dtype end where kernels like a tensor to begin


def copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in `dtype`, as parts of one buffer."""
    if not tensors:
        return []
    sizes = [-(-t.numel() // ALIGNED) * ALIGNED for t in tensors]
    parts = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device).split(sizes)
    outs = [
        (part if len(part) == t.numel() else part[: t.numel()]).view(t.shape)
        for part, t in zip(parts, tensors)
    ]
    copy_together(outs, list(tensors))
    return outs
