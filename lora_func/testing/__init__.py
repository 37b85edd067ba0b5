"""The laws that every variant keeps, for tests and notebooks.

`check_variant(Mine())` checks them on a variant of your own. The library's own tests run the same
laws over its catalogue, on layers that hypothesis draws.
"""

from . import forms  # noqa: F401  (its laws)
from .check import Report, check_variant
from .law import LAWS, Broken, Law
from .laws import rounding_at_init
from .layer import ANY, Layer, stats_for

__all__ = [
    "ANY",
    "LAWS",
    "Broken",
    "Law",
    "Layer",
    "Report",
    "check_variant",
    "rounding_at_init",
    "stats_for",
]
