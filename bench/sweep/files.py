"""What a sweep leaves on disk: lines of results, and tensors of unfinished work.

A line is written whole or, after a kill, cut off at the next start. A file of tensors is replaced
atomically.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_func import LoraFuncError


class Results:
    """The rows of `results.jsonl`, oldest first."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):  # killed in the middle of a line
                os.truncate(path, len(whole))
        self.rows = list(read_rows(path)) if path.exists() else []

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row, and returns when it is on the disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)

    def of(self, kind: str, group: str | None = None) -> list[dict[str, Any]]:
        """The rows of a kind, of one group or of all."""
        rows = [row for row in self.rows if row["kind"] == kind]
        return [row for row in rows if group is None or row["group"] == group]

    def begin(self, settings: dict[str, Any], where: dict[str, str]) -> int:
        """Notes a new run, and returns its number.

        Raises LoraFuncError if the rows that are there come from other settings.
        """
        for row in self.of("run"):
            other = {
                k: row["settings"].get(k)
                for k, v in settings.items()
                if row["settings"].get(k) != v
            }
            if other:
                now = {name: settings[name] for name in other}
                raise LoraFuncError(
                    f"{str(self.path)!r} was begun with {other}, and this run has {now}: give "
                    "another --out, or the same settings"
                )
        number = len(self.of("run"))
        self.add({"kind": "run", "run": number, "settings": settings, "where": where})
        return number


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file. Raises LoraFuncError if a line is none."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise LoraFuncError(f"{path}:{number} is no JSON: {error}") from error


def save_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes beside `path`, and renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)
    os.replace(temporary, path)


def load_state(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors in a file."""
    return {name: t.clone() for name, t in load_file(path, device=str(device)).items()}
