"""`load`: a file back into an adapter and its parameters. It parses, builds and places."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..engine import stack
from ..engine.adapter import Adapter
from ..engine.keys import by_path, flat_key, key_mismatch
from ..engine.leaves import Leaves, blank
from ..engine.sites import Base
from ..errors import LoraFuncError, listing
from ..libraries import transformers
from ..variant import Variant
from ..variants import VARIANTS
from ..weights.layer import LayerWeight
from ..weights.parameter import ParameterWeight
from .format import Manifest, parse


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    variants: Iterable[type[Variant]] = (),
    check_base: str = "warn",
) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter and the parameters in a file, for `model`.

    They have the bits that were saved, on the devices of their layers.

    Args:
        path: of a file that `save` wrote, or of a folder that `save_pretrained` of a bound module
            or a trainer's checkpoint wrote.
        model: the model that the adapter was made for, or one with the same layers.
        variants: classes beyond the catalogue that the file may name, as in `variants=[Mine]`.
        check_base: what to do if the weights of the targets are not those that the adapter was
            made on: "warn" or "error".

    Raises:
        LoraFuncError: no such file; a truncated or altered one; a file of something else; an
            unknown variant or field; a model without the targets or with other shapes; missing or
            unexpected tensors.
    """
    if check_base not in ("warn", "error"):
        raise LoraFuncError(f"check_base={check_base!r}; expected 'warn' or 'error'")
    if isinstance(path, nn.Module) or not isinstance(model, nn.Module):
        given = f"({type(path).__name__}, {type(model).__name__})"
        raise LoraFuncError(f"load(path, model) takes a path and a module, not {given}")
    path = Path(path)
    if path.is_dir() and (path / transformers.WEIGHTS).is_file():
        path = path / transformers.WEIGHTS
    of_peft = (path if path.is_dir() else path.parent) / "adapter_config.json"
    if path.is_dir() and not of_peft.is_file():
        raise LoraFuncError(f"{str(path)!r} is a folder; give the path of a file in it")
    if path.is_dir() or (of_peft.is_file() and path.name == "adapter_model.safetensors"):
        raise LoraFuncError(
            f"{str(of_peft.parent)!r} is a folder of PEFT's: lora_func.interop.peft.load(folder, "
            "model) reads it"
        )
    if not path.is_file():
        raise LoraFuncError(f"there is no file {str(path)!r}")
    catalogue = {**VARIANTS, Chain.name(): Chain, **{kind.name(): kind for kind in variants}}
    try:
        with torch.inference_mode(False):  # see adapt
            manifest = parse(path, catalogue)
            plan = build(manifest, model)
            compare_fingerprints(manifest.base, plan.base, check_base)
            return place(manifest, plan, model)
    except LoraFuncError as error:
        raise LoraFuncError(f"{str(path)!r}: {error}") from error


class Plan(NamedTuple):
    """What a file needs of a model, checked."""

    weights: dict[str, LayerWeight | ParameterWeight]
    expected: Leaves  # on the device "meta"
    base: dict[str, Base]  # of this model


def build(manifest: Manifest, model: nn.Module) -> Plan:
    """The model's layers and the leaves that the variants expect, checked against the file."""
    adapter = Adapter(manifest.variants, {}, {}, manifest.base, torch.float32)
    weights = adapter.weights(model)
    try:
        expected = blank(manifest.variants, manifest.base, manifest.tensors)
    except LoraFuncError:
        raise
    except Exception as error:  # of any kind: a rank of 10**30 overflows
        kinds = listing(dict.fromkeys(manifest.variants.values()))
        raise LoraFuncError(f"no layer can have the parameters of {kinds} ({error!r})") from error
    stored = {key: leaf for key, leaf in expected.frozen.items() if key not in manifest.rebuilt}
    trainable = manifest.tensors.keys() - manifest.constants
    for kind, given, wanted in (
        ("trainable", trainable, expected.trainable),
        ("frozen", manifest.constants, stored),
    ):
        if given != wanted.keys():
            raise LoraFuncError(f"{kind} {key_mismatch(given, wanted)}")
    for key, wanted in {**expected.trainable, **stored}.items():
        given = manifest.tensors[key]
        floating = given.is_floating_point() == wanted.is_floating_point()
        if given.shape != wanted.shape or not floating:
            raise LoraFuncError(
                f"tensor {key!r} is {given.dtype} of shape {tuple(given.shape)}, where one like "
                f"{wanted.dtype} of shape {tuple(wanted.shape)} was expected"
            )
    return Plan(weights, expected, {path: Base.of(w, w) for path, w in weights.items()})


def place(manifest: Manifest, plan: Plan, model: nn.Module) -> tuple[Adapter, dict[str, Tensor]]:
    """The tensors on the devices of their layers, and the adapter."""
    expected, weights = plan.expected, plan.weights
    devices = {
        key: weights[path].device
        for path, leaves in by_path(manifest.tensors).items()
        if path in weights
        for key, _ in leaves.values()
    }
    first = next(iter(weights.values())).device  # for tensors that all layers share
    # Cloned: safetensors hands tensors out at 8-byte alignment, where the CPU's matrix kernels
    # differ in the last bits.
    placed = {
        key: manifest.tensors[key].clone().to(devices.get(key, first))
        for key in (*expected.trainable, *expected.frozen)
        if key not in manifest.rebuilt
    }
    if manifest.rebuilt:
        placed |= rebuild(manifest, weights, placed)
    params = {key: placed[key] for key in expected.trainable}
    adapter = Adapter(
        manifest.variants,
        {key: leaf.shape for key, leaf in params.items()},
        {key: placed[key] for key in expected.frozen},
        {
            path: base._replace(fingerprint=manifest.base[path].fingerprint)
            for path, base in plan.base.items()
        },
        next((leaf.dtype for leaf in params.values()), torch.float32),
        dropout=manifest.dropout,
    )
    adapter.remember(model)
    adapter.trust(model)
    return adapter, params


@torch.no_grad()
def rebuild(
    manifest: Manifest,
    weights: Mapping[str, LayerWeight | ParameterWeight],
    leaves: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The constants that a file leaves out, from the weights of the model.

    Raises LoraFuncError for one that cannot be rebuilt.
    """
    own = by_path(leaves)
    found = {}
    for path, variant in manifest.variants.items():
        given = {name: leaf for name, (_, leaf) in own.get(path, {}).items()}
        for name, leaf in stack.rebuild(variant, weights[path], given).items():
            found[flat_key(path, name)] = leaf.to(weights[path].device).contiguous()
    if unknown := [key for key in manifest.rebuilt if key not in found]:
        raise LoraFuncError(
            f"the file leaves out {listing(unknown)}, which cannot be rebuilt from the weights"
        )
    return {key: found[key] for key in manifest.rebuilt}


def compare_fingerprints(
    known: Mapping[str, Base], found: Mapping[str, Base], check_base: str
) -> None:
    """Warns or raises if weights are not those that the adapter was made on.

    The device "meta" has none to compare.
    """
    changed = [
        path
        for path, base in known.items()
        if base.fingerprint is not None
        and found[path].fingerprint is not None
        and base.fingerprint != found[path].fingerprint
    ]
    if changed:
        message = (
            f"the adapter was made on another base: the weights of {len(changed)} of {len(known)} "
            f"adapted layers differ, such as {listing(changed, limit=3)}. Load the checkpoint "
            "that it was trained on"
        )
        if check_base == "error":
            raise LoraFuncError(message)
        warnings.warn(message + ", or expect other results", stacklevel=3)
