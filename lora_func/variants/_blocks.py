"""Sizes of layers as products of integers."""

from __future__ import annotations

import math

from ..errors import LoraFuncError
from ..variant import Variant


def divisor(d: int, factor: int | None) -> int:
    """`factor`, if it divides d; otherwise the largest divisor of d up to it and to sqrt(d).

    None: the largest divisor of d up to sqrt(d).
    """
    if factor is not None and d % factor == 0:
        return factor
    most = min(factor or d, math.isqrt(d))
    return next(m for m in range(most, 0, -1) if d % m == 0)


def check_divides(variant: Variant, name: str, shape: tuple[int, ...]) -> None:
    """Raises LoraFuncError unless the field `name` divides both sizes of a layer of `shape`."""
    value, common = getattr(variant, name), math.gcd(*shape)
    if common % value:
        below = next(n for n in range(min(value, common), 0, -1) if common % n == 0)
        above = [n for n in range(value, common + 1) if common % n == 0][:1]
        nearest = " or ".join(map(str, [below, *above]))
        raise LoraFuncError(
            f"{type(variant).__name__}({name}={value}) on a layer of shape {shape}: {name} must "
            f"divide both sizes; the nearest that does is {nearest}"
        )
