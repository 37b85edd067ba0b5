"""The library's one exception, and the parts that its messages share."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from importlib.util import find_spec


class LoraFuncError(ValueError):
    """Bad input. The message says what was given, what was expected, and how to fix it."""


def listing(names: Iterable[object], limit: int = 6) -> str:
    """Names for a message: quoted, separated by commas, at most `limit` of them."""
    quoted = [repr(str(name)) for name in names]
    more = f" and {len(quoted) - limit} more" if len(quoted) > limit else ""
    return ", ".join(quoted[:limit]) + more


def near_misses(given: str, known: Iterable[str]) -> str:
    """A sentence such as " Did you mean 'q_proj'?", or "" if no known name resembles `given`."""
    found = difflib.get_close_matches(given, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f" Did you mean {listing(found)}?" if found else ""


def deprecated(old: str, new: str, removed_in: str) -> None:
    """Warns the caller's caller that `old` works until version `removed_in`, and names `new`."""
    message = f"{old} is deprecated and will be removed in lora_func {removed_in}; use {new}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def check_extra(extra: str, *packages: str) -> None:
    """For a command line: ends it with one line if it lacks packages that an extra brings."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)} not found. This command needs the extra {extra!r}: "
            f'pip install "lora_func[{extra}]", or ".[{extra}]" in a clone'
        )
