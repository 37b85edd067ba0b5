"""How PEFT's configs name layers: lists of last parts of paths, regexes, and exceptions by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ...errors import LoraFuncError

ALL_LINEAR = "all-linear"


def ends(path: str, names: Iterable[str]) -> bool:
    """Whether a path is one of the names, or ends with one after a dot."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def is_named(named: str | Collection[str] | None, path: str) -> bool:
    """Whether a field such as target_modules names a path: a regex for all of it, or a list."""
    if not named:
        return False
    return bool(match(named, path)) if isinstance(named, str) else ends(path, named)


def match(pattern: str, path: str) -> re.Match[str] | None:
    """`re.fullmatch`. Raises LoraFuncError for what is no regex."""
    try:
        return re.fullmatch(pattern, path)
    except re.error as error:
        raise LoraFuncError(
            f"the config has the pattern {pattern!r}, which is not a regular expression: {error}"
        ) from error


def is_target(config: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT would adapt the module at a path."""
    targets = config.get("target_modules")
    saved = config.get("modules_to_save") or ()
    inside = any(match(rf"(.*\.)?{re.escape(name)}(\..*)?", path) for name in saved)
    if inside or is_named(config.get("exclude_modules"), path) or not is_named(targets, path):
        return False
    indices = config.get("layers_to_transform")
    if isinstance(targets, str) or path in (targets or ()) or indices in (None, []):
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # The first number after such a name.
        before = r"(.*?\.)" if patterns == [r"[^.]*"] else r"(.*?\.)?"
        if found := match(rf"{before}({pattern})\.(?P<index>\d+)\..*", path):
            index = int(found["index"])
            return index == indices if isinstance(indices, int) else index in indices
    return False


def exception(exceptions: Mapping[str, Any] | None, path: str, anchored: bool, usual: Any) -> Any:
    """The value of a layer in a field such as rank_pattern; `usual` if the field does not name it.

    Each key is a regex for the end of a path, after a dot, or, if `anchored`, for all of it.
    """
    exceptions = exceptions or {}
    start = r"(.*\.)?" if anchored else r".*\."
    key = next((key for key in exceptions if match(f"{start}({key})", path)), path)
    return exceptions.get(key, usual)


def feeds_forward(config: Mapping[str, Any], path: str) -> bool:
    """Whether IA3 scales the input of the layer at a path, and not its output."""
    named = config.get("feedforward_modules") or ()
    if isinstance(named, str):
        return bool(match(named, path))
    return any(path.endswith(name) for name in named)


def shortest(targets: Collection[str], others: Collection[str]) -> list[str]:
    """The last parts of the targets' paths, if no other path ends so; otherwise the whole paths."""
    last = sorted({path.rpartition(".")[2] for path in targets})
    if not any(ends(path, last) for path in others if path not in targets):
        return last
    return sorted(targets)
