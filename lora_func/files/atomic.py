"""Writing a file so that, whatever happens, it is the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import LoraFuncError


def writable(path: str | os.PathLike[str]) -> Path:
    """The real path of a file to write. Raises LoraFuncError if no file can stand there."""
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise LoraFuncError(f"{str(real)!r} is a folder; give the path of a file in it")
    if real.exists() and not real.is_file():
        raise LoraFuncError(
            f"{str(real)!r} is a device or a pipe, which a file would replace; give the path of a "
            "file"
        )
    if not real.parent.is_dir():
        raise LoraFuncError(
            f"{str(real)!r} cannot be written: there is no folder {str(real.parent)!r}; make it "
            "first"
        )
    return real


def replace_file(path: Path, content: bytes | Iterable[Any]) -> None:
    """Writes bytes, or buffers one after the other, beside `path` and renames.

    The new file has the mode of the old one, otherwise what the umask leaves. A process that is
    killed can leave its temporary file behind, under a hidden name that ends in .tmp.
    """
    # Cut, because names have at most 255 bytes.
    temporary = path.with_name(f".{path.name[:32]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if path.exists():
                shutil.copymode(path, temporary)  # before there is anything to read in it
            for part in [content] if isinstance(content, bytes) else content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # Windows and some file systems cannot sync a folder, that is, the rename.
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
