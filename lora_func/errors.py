"""The one exception of the library, and how its messages name near misses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraFuncError(ValueError):
    """Bad input. The message says what was given, what was expected, and what would do."""


def listing(names: Iterable[object], limit: int = 6) -> str:
    """Names for a message: quoted, comma-separated, at most `limit` of them."""
    names = [repr(str(name)) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def near_misses(given: str, known: Iterable[str]) -> str:
    """A sentence such as " Did you mean 'q_proj'?", or "" when nothing known is near to `given`."""
    found = difflib.get_close_matches(given, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f" Did you mean {listing(found)}?" if found else ""
