"""PEFT: models that carry its adapters. It is not imported."""

from __future__ import annotations

from typing import Any

RELIES_ON = {
    "peft.tuners.tuners_utils": (
        "BaseTunerLayer",
        "BaseTuner.unload",
        "BaseTuner.merge_and_unload",
    ),
}


def is_adapted(module: Any) -> bool:
    """Whether a module is a layer with adapters of PEFT."""
    return any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__)
