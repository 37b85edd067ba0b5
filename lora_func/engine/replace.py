"""Other hyperparameters for the variants of an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import LoraFuncError, listing, near_misses
from ..variant import Variant


def replaced(variants: Mapping[str, Variant], fields: Mapping[str, Any]) -> dict[str, Variant]:
    """path -> variant, with those `fields` that it has.

    Raises LoraFuncError for a field that none has.
    """
    parts = [part for variant in variants.values() for part in variant.parts()]
    known = {field.name for part in parts for field in dataclasses.fields(part)}
    if unknown := [name for name in fields if name not in known]:
        raise LoraFuncError(
            f"no variant of this adapter has a field {listing(unknown)}."
            f"{near_misses(unknown[0], known)}"
        )
    return {path: with_fields(variant, fields) for path, variant in variants.items()}


def with_fields(variant: Variant, fields: Mapping[str, Any]) -> Variant:
    """A variant, or the links of a chain, with those `fields` that it has."""
    own = {}
    for field in dataclasses.fields(variant):
        old = getattr(variant, field.name)
        if field.name in fields:
            new = fields[field.name]
            own[field.name] = new(old) if callable(new) else new
        elif isinstance(old, tuple):
            own[field.name] = tuple(with_fields(link, fields) for link in old)
    return dataclasses.replace(variant, **own)
