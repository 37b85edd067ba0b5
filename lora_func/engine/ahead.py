"""What a call prepares before the model runs: the parameters of all layers, rounded together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..libraries.functorch import applied, copy_together, in_transform
from . import together
from .examples import Entries, prepare
from .holder import Holder
from .layer import AdaptedLayer


def prepare_ahead(model: nn.Module, layers: Sequence[AdaptedLayer]) -> None:
    """Gives each layer its prepared parameters for the whole call.

    Equal layers prepare together, if their variant says so. And one kernel rounds the parameters of
    all others to the dtype of their inputs. Layer by layer, hundreds of small ones would run before
    the model has its first.
    """
    eager, likely = not torch.compiler.is_compiling(), dtype_of(model)
    groups: dict[Any, list[tuple[AdaptedLayer, Entries]]] = defaultdict(list)
    alone: list[tuple[AdaptedLayer, Entries, torch.dtype | None]] = []
    for layer in layers:
        site, dtype, entries = layer._site, layer.dtype_ahead(likely), layer.plain()
        stacks = eager and site.variant.prepares_together and entries.params.keys() - site.shared
        if dtype is None or not stacks:
            alone.append((layer, entries, dtype))
            continue
        kind = together.kind_of(layer._weight, entries, site.shared)
        groups[site.variant, dtype, site.shared, kind].append((layer, entries))
    for (variant, dtype, shared, _), group in groups.items():
        size = together.fitting(group[0][1], shared)
        for i in range(0, len(group), size):
            members, entries = zip(*group[i : i + size])
            if len(members) < together.FEWEST:
                alone += [(layer, own, dtype) for layer, own in zip(members, entries)]
                continue
            weights = [layer._weight for layer in members]
            made = together.prepare_together(variant, weights, entries, shared, dtype)
            for layer, prepared in zip(members, made):
                layer.take(prepared)
    prepare_alone(alone, at_once=eager and not in_transform())


def prepare_alone(
    layers: Sequence[tuple[AdaptedLayer, Entries, torch.dtype | None]], at_once: bool
) -> None:
    """Each layer prepares its parameters. `at_once`: all of them are rounded by one kernel."""
    # Constants apart from leaves: of one function, all outputs would require grad.
    waiting: dict[Any, list[tuple[dict[str, Tensor], str]]] = defaultdict(list)
    for layer, entries, dtype in layers:
        variant = layer._site.variant
        if dtype is None:
            layer.take(entries)
            continue
        wide = dtype
        if at_once and variant.rounds_last:
            for leaf in entries.params.values():
                wide = wide if leaf.dtype == wide else torch.promote_types(wide, leaf.dtype)
        params, own, _ = prepare(variant, layer._weight, entries, wide)
        layer.take(Entries(params, own, dtype))
        if wide == dtype:
            continue
        for name, t in params.items():
            if t.dtype != dtype and t.is_floating_point():
                waiting[t.device, t.dtype, t.requires_grad, dtype].append((params, name))
    for (*_, dtype), places in waiting.items():
        rounded = applied(RoundTogether, dtype, *(params[name] for params, name in places))
        for (params, name), t in zip(places, rounded):
            params[name] = t


def dtype_of(model: nn.Module) -> torch.dtype:
    """That of the first parameter that is not packed, and so most likely of the activations."""
    for module in model.modules():
        if isinstance(module, Holder):  # of a bound view, with the adapter's own parameters
            continue
        for t in module._parameters.values():  # which are plain tensors in a bound view
            if t is not None and type(t) in (Tensor, nn.Parameter) and t.is_floating_point():
                return t.dtype
    return torch.float32


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
