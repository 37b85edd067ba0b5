"""Checks that variants call, on their hyperparameters and on what `init` is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import LoraFuncError
from .variant import Variant

__all__ = [
    "check_choice",
    "check_fits",
    "check_number",
    "check_positive",
    "check_rank",
    "needs_data",
]

LARGEST = 2**63  # beyond torch's integers, and within float32 and bfloat16


def check_rank(variant: Variant, name: str = "r") -> None:
    """Raises LoraFuncError unless the field `name` is an integer of at least 1."""
    value = getattr(variant, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refusal(variant, name, "an integer of at least 1, such as 8")


def check_positive(variant: Variant, name: str) -> None:
    """Raises LoraFuncError unless the field `name` is a finite number above 0."""
    if not is_number(getattr(variant, name)) or not getattr(variant, name) > 0:
        raise refusal(variant, name, "a finite number above 0 and below 2**63")


def check_number(variant: Variant, name: str) -> None:
    """Raises LoraFuncError unless the field `name` is a finite number."""
    if not is_number(getattr(variant, name)):
        raise refusal(variant, name, "a finite number between -2**63 and 2**63")


def check_choice(variant: Variant, name: str, choices: Sequence[Any]) -> None:
    """Raises LoraFuncError unless the field `name` is one of `choices`. 1 is not True."""
    value = getattr(variant, name)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise refusal(variant, name, " or ".join(repr(choice) for choice in choices))


def check_fits(variant: Variant, shape: tuple[int, ...], limit: int | None = None) -> None:
    """Raises LoraFuncError if r exceeds `limit` on a layer of `shape`; None: min(d_out, d_in)."""
    r, limit = variant.r, min(shape) if limit is None else limit  # pyright: ignore
    if r > limit:
        raise LoraFuncError(
            f"{type(variant).__name__}(r={r}) on a layer of shape {shape}: r must be at most "
            f"{limit} there"
        )


def needs_data(variant: Variant, what: str) -> LoraFuncError:
    """The error of an `init` that was given no statistics, and starts from `what`."""
    return LoraFuncError(
        f"{type(variant).__name__} starts from {what}: pass calibration=batches to adapt, "
        "or stats= to adapt or Adapter.init"
    )


def is_number(value: Any) -> bool:
    """Whether `value` is a finite real number that torch takes as a scalar.

    It takes no integer of 2**63 or more, and no float that overflows float32, such as 1e308.
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def refusal(variant: Variant, name: str, expected: str) -> LoraFuncError:
    """The error of a field that is not what was expected."""
    value = getattr(variant, name)
    kind = type(variant).__name__
    return LoraFuncError(f"{kind}({name}={value!r}): {name} must be {expected}")
