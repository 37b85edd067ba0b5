"""What a law is, and how it fails: with its name and the numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraFuncError
from ..variant import Variant
from .layer import ANY, Layer, Shape

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 5e-3,
}
"""Relative to the largest entry of a reference in float64: what the dtype resolves, times what a
product over at most 96 inputs accumulates."""
DTYPES = tuple(TOLERANCE)


class Broken(LoraFuncError):
    """A law that a variant breaks. The message names the law and shows the numbers."""


@dataclass(frozen=True)
class Law:
    """One law: what it says, how it is checked, and on which layers."""

    check: Callable[[Layer], None]
    """Raises Broken if a layer breaks the law. Its name is that of the law."""
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    """The dtypes of the layers."""
    leads: tuple[Shape, ...] = ANY
    """The leading axes of x."""
    largest: int = 96
    """The largest d_out or d_in of a layer: laws that cost much take small ones."""
    applies: Callable[[Variant], bool] = lambda variant: True
    """Whether the law says something of a variant."""
    trains: bool = False
    """Whether it says something of trainable leaves."""

    @property
    def name(self) -> str:
        """The name in reports and in `LAWS`."""
        return self.check.__name__

    @property
    def statement(self) -> str:
        """The law in one line."""
        return (self.check.__doc__ or "").splitlines()[0]


LAWS: dict[str, Law] = {}
"""name -> law."""


def law(**about: Any) -> Callable[[Callable[[Layer], None]], Callable[[Layer], None]]:
    """Enters a function of a layer into `LAWS`."""

    def enter(check: Callable[[Layer], None]) -> Callable[[Layer], None]:
        LAWS[check.__name__] = Law(check, **about)
        return check

    return enter


def expect(holds: bool | Tensor, message: str) -> None:
    """Raises Broken unless `holds`."""
    if not holds:
        raise Broken(message)


def expect_equal(given: Tensor, expected: Tensor, what: str) -> None:
    """Raises Broken unless two tensors are equal to the bit."""
    if given.shape != expected.shape or given.dtype != expected.dtype:
        got = f"{given.dtype} of shape {tuple(given.shape)}"
        raise Broken(f"{what}: {got}, expected {expected.dtype} of shape {tuple(expected.shape)}")
    if not torch.equal(given, expected):
        off = (given.double() - expected.double()).abs().max().item()
        raise Broken(f"{what}: {off:.3g} off, expected equality to the bit")


def expect_close(
    given: Tensor, expected: Tensor, tolerance: float, what: str, scale: Tensor | None = None
) -> None:
    """Raises Broken unless `given` is within `tolerance` of the largest entry of `expected`.

    `scale`: other tensor whose largest entry counts, if `expected` may cancel.
    """
    if given.shape != expected.shape:
        raise Broken(f"{what}: shape {tuple(given.shape)}, expected {tuple(expected.shape)}")
    if not given.numel():
        return
    sizes = [t.abs().max().item() for t in (expected, scale) if t is not None and t.numel()]
    off = (given.double() - expected.double()).abs().max().item()
    limit = tolerance * max(*sizes, 1e-30)
    if not off <= limit:
        raise Broken(f"{what}: {off:.3g} off, at most {limit:.3g} allowed")
