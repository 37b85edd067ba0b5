"""Adapters as GGUF files, which llama.cpp and what is built on it load beside a base in GGUF.

Such a file has LoRA's factors under llama.cpp's own names, and one alpha for all layers: layer l is
scaled by alpha / r_l. What the converter of the base does to a weight must be done to its change:
in Llama, llama.cpp rotates pairs of neighbours, so the rows of each head of q_proj and k_proj are
in another order there.

    from lora_func.interop import gguf
    gguf.save("adapter.gguf", adapter, params, model)   # llama-cli -m base.gguf --lora adapter.gguf
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..arithmetic import as_lora
from ..engine.adapter import Adapter, check_order
from ..errors import LoraFuncError, listing
from ..files.atomic import replace_file, writable


class Architecture(NamedTuple):
    """How llama.cpp holds the models of a `model_type` of transformers."""

    name: str
    permutes: bool = False  # whether the rows of q_proj and k_proj are in another order


ARCHITECTURES = {
    "llama": Architecture("llama", permutes=True),
    "mistral": Architecture("llama", permutes=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}


def save(
    path: str | os.PathLike[str], adapter: Adapter, params: Mapping[str, Tensor], model: nn.Module
) -> None:
    """Writes an adapter as one GGUF file, in float32. Needs the package `gguf`.

    Any variant that `as_lora` turns into an exact LoRA leaves so. For another one, take its
    approximation: `gguf.save(path, *lf.as_lora(adapter, params, r=16, model=model), model)`.

    Args:
        path: of the file. An older file is replaced only when the new one is whole.
        adapter: as `adapt` or `load` returned it.
        params: flat key -> tensor, for one adapter.
        model: the model of transformers that the adapter was made for.

    Raises:
        LoraFuncError: a model that is not of the known architectures; a target that llama.cpp does
            not have as a linear layer, such as an embedding, experts or a tied head; a bias; and
            what `as_lora` raises.
    """
    check_order("save(path, adapter, params, model)", adapter=adapter, model=model)
    adapter.check(params, examples=False)
    real = writable(path)
    library = package()
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in ARCHITECTURES:
        raise LoraFuncError(
            f"a model of the type {kind!r} is not among those whose layout in GGUF is known here, "
            f"{listing(ARCHITECTURES)}. Save the adapter in PEFT's format, and let llama.cpp's "
            "convert_lora_to_gguf.py convert it"
        )
    architecture = ARCHITECTURES[kind]
    plain, leaves = as_lora(adapter, params, model=model)
    names = names_of(plain, config, library, architecture.name)
    alpha = max(leaves[f"{target}.lora_A"].shape[0] for target in names)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.gguf"
        writer = library.GGUFWriter(file, architecture.name)
        writer.add_type(library.GGUFType.ADAPTER)
        writer.add_string(library.Keys.Adapter.TYPE, "lora")
        writer.add_float32(library.Keys.Adapter.LORA_ALPHA, float(alpha))
        for target, name in names.items():
            A, B = (leaves[f"{target}.lora_{leaf}"].detach().cpu().float() for leaf in "AB")
            B = B * (len(A) / alpha)
            if architecture.permutes:
                B = permuted(B, target, config)
            writer.add_tensor(f"{name}.lora_a", A.contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", B.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        replace_file(real, file.read_bytes())


def names_of(adapter: Adapter, config: Any, library: Any, architecture: str) -> dict[str, str]:
    """Path of each target -> the name of its weight in llama.cpp. Raises LoraFuncError."""
    arch = next(key for key, name in library.MODEL_ARCH_NAMES.items() if name == architecture)
    known = library.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {}
    for target, variant in adapter.variants.items():
        name = known.get_name(f"{target}.weight", try_suffixes=(".weight",))
        if adapter.base[target].tensor is not None or name is None:
            raise LoraFuncError(
                f"{target!r} is no linear layer that llama.cpp's {architecture!r} has: leave it "
                "out of the targets"
            )
        if name == "output.weight" and config.tie_word_embeddings:
            raise LoraFuncError(
                f"{target!r} is tied to the embedding, and llama.cpp holds the two as one: leave "
                "it out of the targets"
            )
        if variant.add_bias:  # pyright: ignore  (a LoRA)
            raise LoraFuncError(f"{target!r}: {variant} adds a bias, which llama.cpp does not")
        found[target] = name
    return found


def permuted(B: Tensor, target: str, config: Any) -> Tensor:
    """`B [d_out, r]` with the rows of each head in the order in which llama.cpp has them.

    transformers rotates row i of a head with row i + d / 2, llama.cpp row 2 i with row 2 i + 1.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    n = heads.get(target.rpartition(".")[2])
    return B if n is None else B.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)


def package() -> Any:
    """The package `gguf`. Raises LoraFuncError if it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise LoraFuncError("GGUF files need the package gguf: pip install gguf") from error
