"""The keys of the flat dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import listing, near_misses

SHARED = "shared"  # in a key, takes the place of the path for a tensor that all layers share


def flat_key(path: str, name: str) -> str:
    """ "model.layers.0.q_proj", "A" -> "model.layers.0.q_proj.lora_A"."""
    return f"{path}.lora_{name}" if path else f"lora_{name}"


def by_path(flat: Mapping[str, Any]) -> dict[str, dict[str, tuple[str, Any]]]:
    """path -> short name -> (flat key, value)."""
    nested: dict[str, dict[str, tuple[str, Any]]] = {}
    for key, value in flat.items():
        path, _, name = key.rpartition("lora_")
        nested.setdefault(path.removesuffix("."), {})[name] = (key, value)
    return nested


def key_mismatch(given: Iterable[str], expected: Iterable[str]) -> str:
    """The message for a flat dict with other keys than expected."""
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    parts = []
    if missing:
        parts.append(f"missing {listing(missing)}.")
    if unexpected:
        hint = near_misses(unexpected[0], missing or expected)
        parts.append(f"unexpected {listing(unexpected)}.{hint}")
    return "params: " + " ".join(parts)
