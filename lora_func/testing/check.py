"""`check_variant`: all laws, on a variant of your own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraFuncError
from ..variant import Variant, Weight
from .law import LAWS, Broken
from .layer import Layer, stats_for


@dataclass(frozen=True)
class Report:
    """What `check_variant` found. Printed, it is a table."""

    variant: Variant
    """The variant that was checked."""
    held: dict[str, int]
    """Name of a law -> number of layers on which it held."""
    left_out: dict[str, str]
    """Name of a law -> why it was not checked."""

    def __str__(self) -> str:
        width = max(map(len, (*self.held, *self.left_out)), default=0)
        lines = [f"{self.variant}: {len(self.held)} laws hold"]
        for name, count in self.held.items():
            lines.append(f"  {name:<{width}}  {count:>3} layers  {LAWS[name].statement}")
        lines += [f"  {name:<{width}}  not checked: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


def check_variant(
    variant: Variant,
    shapes: Sequence[tuple[int, int]] = ((12, 8), (8, 12), (16, 16)),
    *,
    laws: Collection[str] | None = None,
    noise: Callable[[Tensor], Tensor] = lambda n: 0.3 * n,
    moved: float = 0.0,
    stats: Callable[[Weight], Any] | None = None,
    seed: int = 0,
) -> Report:
    """Checks a variant against every law that applies to it, on random layers.

    Args:
        shapes: (d_out, d_in) of the layers. Laws that compare with finite differences use the
            smallest.
        laws: names of `LAWS`; None means all.
        noise: what is added to initial parameters to get trained ones, from N(0, 1) of their shape.
        moved: for a variant with `at_init="moved"`: how far, relative to the base output.
        stats: weight -> what `init` gets; None collects the variant's statistic on random tokens.
        seed: of everything random.

    Returns:
        A `Report` of the laws that hold, which prints as a table.

    Raises:
        Broken: with the name of each broken law, the layer and the numbers.
        LoraFuncError: an unknown law.
    """
    if unknown := [name for name in laws or () if name not in LAWS]:
        raise LoraFuncError(f"unknown law {unknown}; the laws are {list(LAWS)}")
    held: dict[str, int] = {}
    left_out: dict[str, str] = {}
    broken: list[str] = []
    give = stats if stats is not None else lambda weight: stats_for(variant, weight)
    for name in LAWS if laws is None else laws:
        item = LAWS[name]
        generator = torch.Generator().manual_seed(seed)
        if not item.applies(variant):
            left_out[name] = "it does not apply to this variant"
            continue
        small = [shape for shape in shapes if max(shape) <= item.largest]
        chosen = small or [min(shapes, key=max)]
        kinds = itertools.product(chosen, item.dtypes, item.leads)
        layers = [
            Layer.draw(
                variant,
                shape,
                generator,
                lead=lead,
                bias=bool(number % 2),
                dtype=dtype,
                noise=noise,
                stats=give,
                moved=moved,
            )
            for number, (shape, dtype, lead) in enumerate(kinds)
        ]
        if item.trains and not any(layer.names for layer in layers):
            left_out[name] = "it has no trainable leaves"
            continue
        try:
            for layer in layers:
                item.check(layer)
            held[name] = len(layers)
        except Exception as error:  # whatever a variant raises: it is reported under its law
            detail = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
            shape, dtype = layer.weight.shape, layer.x.dtype  # pyright: ignore
            where = f"on a layer of shape {shape}, x {tuple(layer.x.shape)} in {dtype}"  # pyright: ignore
            broken.append(f"{name} ({item.statement})\n    {where}: {detail}")
    if broken:
        raise Broken(f"{variant} breaks {len(broken)} of the laws:\n  " + "\n  ".join(broken))
    return Report(variant, held, left_out)
