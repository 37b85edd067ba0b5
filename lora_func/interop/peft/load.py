"""`load`: a folder of PEFT's, as an adapter and its parameters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from ...engine.adapter import Adapter
from ...engine.keys import SHARED, flat_key
from ...engine.refused import check_base
from ...engine.sites import Base
from ...errors import LoraFuncError, listing
from ...files.format import Manifest
from ...files.load import build, place
from ...precision import at_least_float32
from ...variant import Params as Leaves
from ...variant import Variant
from ...variants import Full
from ...weights.parameter import ParameterWeight
from ...weights.table import Snapshot
from .config import PICKLE, WEIGHTS, dropout_of, methods_of, read_config
from .method import Method
from .site import shared_leaves, site, take_numbered
from .targets import check_all_there, targets_of
from .whole import check_apart, wholes

PREFIXES = ("base_model.model.", "base_model.")


def load(folder: str | os.PathLike[str], model: nn.Module) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter and the parameters in a folder that PEFT's `save_pretrained` wrote.

    Parameters in half precision become float32, as in PEFT. What PEFT trains whole
    (`modules_to_save`, biases, rows of an embedding) becomes `Full`, the difference from `model`.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        model: the base model, as PEFT got it. It is not modified.

    Raises:
        LoraFuncError: a folder that is not whole; a method or an option that lora_func does not
            have; a model without the layers, or with other shapes; missing or unexpected tensors.

    Warns of options that matter only in training and that the adapter does not have.
    """
    if isinstance(folder, nn.Module) or not isinstance(model, nn.Module):
        given = f"({type(folder).__name__}, {type(model).__name__})"
        raise LoraFuncError(f"load(folder, model) takes a path and a module, not {given}")
    folder = Path(folder)
    if not folder.is_dir():
        raise LoraFuncError(f"there is no folder {str(folder)!r}")
    check_base(model)
    try:
        with torch.inference_mode(False), torch.no_grad():
            manifest = assembled(read_config(folder), read_tensors(folder), model)
            return place(manifest, build(manifest, model), model)
    except LoraFuncError as error:
        raise LoraFuncError(f"{str(folder)!r}: {error}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """key -> tensor, with the keys as the base model has them, and at least in float32."""
    path = folder / WEIGHTS
    if not path.is_file():
        hint = ""
        if (folder / PICKLE).exists():
            hint = (
                f", and {PICKLE} is a pickle, which may run code when it is read: load it in PEFT, "
                "and save_pretrained it again"
            )
        raise LoraFuncError(f"there is no {WEIGHTS} in it{hint}")
    try:
        tensors = safetensors.load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise LoraFuncError(f"{WEIGHTS} is not a whole safetensors file ({error})") from error
    found = {}
    for key, tensor in sorted(tensors.items()):
        prefix = next((p for p in PREFIXES if key.startswith(p)), "")
        found[key.removeprefix(prefix)] = (
            at_least_float32(tensor) if tensor.is_floating_point() else tensor
        )
    return found


class Parts:
    """An adapter that is put together, site by site."""

    def __init__(self) -> None:
        self.variants: dict[str, Variant] = {}
        self.weights: dict[str, Any] = {}
        self.leaves: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}

    def add(self, path: str, variant: Variant, weight: Any, leaves: Leaves) -> None:
        """Adds a site. Raises LoraFuncError if there is one at its path."""
        if path in self.variants:
            raise LoraFuncError(f"{path!r} has two adapters")
        self.variants[path], self.weights[path] = variant, weight
        self.add_leaves(path, leaves)

    def add_leaves(self, path: str, leaves: Leaves) -> None:
        """Adds leaves under a path."""
        self.leaves |= {flat_key(path, name): leaf for name, leaf in leaves.trainable.items()}
        self.constants |= {flat_key(path, name): leaf for name, leaf in leaves.frozen.items()}

    def manifest(self, dropout: float) -> Manifest:
        """All of it. Raises LoraFuncError if there is nothing."""
        if not self.variants:
            raise LoraFuncError("it holds no tensors of an adapter")
        base = {path: Base.of(weight, Snapshot(weight)) for path, weight in self.weights.items()}
        tensors = {**self.leaves, **self.constants}
        return Manifest(self.variants, base, set(self.constants), [], dropout, tensors)


def assembled(config: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module) -> Manifest:
    """The adapter of a config and its tensors."""
    methods = methods_of(config)
    targets, rest = targets_of(config, methods, tensors, model)
    parts, dropout = Parts(), 0.0
    if methods:
        check_all_there(config, targets, model)
    if targets:
        method = methods[0]
        shared = {name: rest.pop(leaf.key, None) for name, leaf in method.shared.items()}
        for index, target in enumerate(targets):
            try:
                take_numbered(target, index, rest)
                if any(tensor.numel() for tensor in target.tensors.values()):  # not of rank 0
                    parts.add(target.path, *site(config, target))
            except LoraFuncError as error:
                raise LoraFuncError(f"{target.path!r}: {error}") from error
        parts.add_leaves(SHARED, shared_leaves(config, targets, shared, parts.variants))
        dropout = dropout_of(method, config)
        say_idle(method, config)
    found, together = wholes(rest, config, model)
    for path, whole in found.items():
        parts.add(path, Full(), whole.weight, Leaves(whole.leaves))
    check_apart(parts.weights, together, model)
    return parts.manifest(acting(dropout, parts))


def acting(dropout: float, parts: Parts) -> float:
    """The dropout of the adapter. Warns where it cannot act as PEFT's does."""
    if not dropout:
        return 0.0
    kernels, whole = [], []
    for path, weight in parts.weights.items():
        if not isinstance(weight, ParameterWeight):
            whole += [path] if isinstance(parts.variants[path], Full) else []
        elif weight.layout.kernel:
            kernels.append(path)
    if whole:
        warnings.warn(
            f"dropout={dropout} is left out: it would also act on {listing(whole)}, which PEFT "
            "trains whole",
            stacklevel=4,
        )
        return 0.0
    if kernels:
        warnings.warn(
            f"dropout={dropout} does not act on the convolutions {listing(kernels)}, as in PEFT",
            stacklevel=4,
        )
    return dropout


def say_idle(method: Method, config: Mapping[str, Any]) -> None:
    """Warns of a dropout that lora_func does not have."""
    given = [name for name in method.idle if "dropout" in name and config.get(name)]
    if given:
        warnings.warn(
            f"{listing(given)} acts in training alone, and this adapter has none", stacklevel=4
        )
