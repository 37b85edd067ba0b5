"""`save` and `load`: one safetensors file with the parameters, the constants, and what is needed to use them again.

The tensors are the flat dicts of trainable and frozen leaves. The metadata has one entry, JSON under the key "lora_func":

    format     the version of this layout
    library    the version of lora_func that wrote it
    variants   [[name, {field: value}], ..], each distinct variant once
    targets    {path: [index into variants, d_out, d_in, fingerprint or null]}
    frozen     [keys of the tensors that are constants]
    rebuilt    [keys of the constants that the file leaves out, to be computed from the weights again]
    digest     SHA-256 of everything else, so that an altered file is known as one
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import secrets
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from .adapt import Adapter, Base, blank, by_path, flat_key, key_mismatch
from .errors import LoraFuncError, listing, near_misses
from .variant import Variant, Weight
from .variants import VARIANTS
from .version import __version__
from .weight import fingerprint, weight_of

FORMAT = 1
KEY = "lora_func"


def save(path: str | os.PathLike[str], adapter: Adapter, params: Mapping[str, Tensor], *, frozen: str = "store") -> None:
    """Writes `adapter` with `params` to one file, which replaces an older one only when it is whole, and keeps its mode.

    `frozen="rebuild"` leaves out the constants that a variant can compute from the weights again, an SVD for each layer of
    AntiPaSTO: a small file, which gives other bits on another machine, and another adapter on another base. To store
    constants in half the size, `save(path, adapter.to(torch.bfloat16), params)`.

    Raises LoraFuncError for params that are not the adapter's, for a variant whose fields are not plain values, and for a
    path that cannot be a file; OSError where the disk refuses. An existing file survives each of these.
    """
    adapter.check(params, examples=False)
    if frozen not in ("store", "rebuild"):
        raise LoraFuncError(f"frozen={frozen!r}; expected 'store' or 'rebuild'")
    rebuilt = rebuildable(adapter) if frozen == "rebuild" else []
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise LoraFuncError(f"{str(path)!r} is a folder; give the path of a file in it")
    if path.exists() and not path.is_file():
        raise LoraFuncError(f"{str(path)!r} is a device or a pipe, which a file would replace; give the path of a file")
    if not path.parent.is_dir():
        raise LoraFuncError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}; make it first")
    variants = list(dict.fromkeys(adapter.variants.values()))
    meta = {
        "format": FORMAT,
        "library": __version__,
        "variants": [[variant.name(), plain_fields(variant)] for variant in variants],
        "targets": {
            target: [variants.index(variant), *adapter.base[target].shape, adapter.base[target].fingerprint]
            for target, variant in adapter.variants.items()
        },
        "frozen": [key for key in adapter.frozen if key not in rebuilt],
        "rebuilt": rebuilt,
    }
    # clones, because the format refuses tensors that share memory
    stored = {key: leaf for key, leaf in {**params, **adapter.frozen}.items() if key not in rebuilt}
    tensors = {key: leaf.detach().cpu().contiguous().clone() for key, leaf in stored.items()}
    meta["digest"] = digest(meta, safetensors.save(tensors))
    replace_file(path, safetensors.save(tensors, {KEY: json.dumps(meta)}))


def load(
    path: str | os.PathLike[str], model: nn.Module, *, variants: Iterable[type[Variant]] = (), check_base: str = "warn"
) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter and the parameters in a file, for `model`: the same bits as were saved, on the devices of their layers.

    Args:
        variants: classes beyond the catalogue that the file may name, as in `variants=[Mine]`.
        check_base: what to do where the weights of the targets are not those that the adapter was made on: "warn" or "error".

    Raises:
        LoraFuncError: no such file, a truncated or altered one, a file of something else, an unknown variant or field, a
            model without the targets or with other shapes, missing or unexpected tensors.
    """
    if check_base not in ("warn", "error"):
        raise LoraFuncError(f"check_base={check_base!r}; expected 'warn' or 'error'")
    path = Path(path)
    if path.is_dir():
        raise LoraFuncError(f"{str(path)!r} is a folder; give the path of a file in it")
    if not path.is_file():
        raise LoraFuncError(f"there is no file {str(path)!r}")
    catalogue = {**VARIANTS, **{kind.name(): kind for kind in variants}}
    try:
        with torch.inference_mode(False):  # see adapt
            return restore(path.read_bytes(), model, catalogue, check_base)
    except LoraFuncError as error:
        raise LoraFuncError(f"{str(path)!r}: {error}") from error


def restore(
    content: bytes, model: nn.Module, catalogue: Mapping[str, type[Variant]], check_base: str
) -> tuple[Adapter, dict[str, Tensor]]:
    """`load` from the bytes of a file."""
    try:
        tensors = safetensors.load(content)
        metadata = split(content)[0].get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise LoraFuncError(f"not a whole safetensors file, so it was truncated or altered ({error})") from error
    if KEY not in metadata:
        raise LoraFuncError("a safetensors file, but not one that lora_func.save wrote")
    try:
        meta = json.loads(metadata[KEY])
        if meta["format"] != FORMAT:
            raise LoraFuncError(
                f"the file has format {meta['format']!r}, and this lora_func reads {FORMAT}; install a newer one"
            )
        if meta.pop("digest") != digest(meta, content):
            raise LoraFuncError("the file was altered after it was saved: its digest is not that of its content")
        kinds = [make_variant(name, fields, catalogue) for name, fields in meta["variants"]]
        assigned, base = {}, {}
        for target, (index, rows, cols, mark) in meta["targets"].items():
            if not all(type(n) is int and n >= 0 for n in (index, rows, cols)) or not isinstance(mark, (str, type(None))):
                raise TypeError(f"the entry of target {target!r}")
            assigned[target], base[target] = kinds[index], Base((rows, cols), mark)
        constants, rebuilt = set(meta["frozen"]), meta["rebuilt"]
        if not assigned or type(rebuilt) is not list or not all(isinstance(key, str) for key in (*constants, *rebuilt)):
            raise TypeError("no targets, or a key that is not a string")
    except (LoraFuncError, MemoryError):
        raise
    except Exception as error:  # of any kind: a value may be one that a user's own variant did not think of
        raise LoraFuncError(f"the file was altered: its metadata is not what lora_func.save writes ({error!r})") from error

    layers = Adapter(assigned, {}, {}, base, torch.float32).layers(model)
    try:
        trainable, frozen = blank(assigned, base, tensors)
    except LoraFuncError:
        raise
    except Exception as error:  # of any kind, as above: a rank of 10**30 overflows
        raise LoraFuncError(f"no layer can have the parameters of {listing(kinds)} ({error!r})") from error
    stored = {key: leaf for key, leaf in frozen.items() if key not in rebuilt}
    for kind, given, expected in (("trainable", tensors.keys() - constants, trainable), ("frozen", constants, stored)):
        if given != expected.keys():
            raise LoraFuncError(f"{kind} {key_mismatch(given, expected)}")
    for key, expected in {**trainable, **stored}.items():
        given = tensors[key]
        if given.shape != expected.shape or given.is_floating_point() != expected.is_floating_point():
            raise LoraFuncError(
                f"tensor {key!r} is {given.dtype} of shape {tuple(given.shape)}, where one like {expected.dtype} of shape "
                f"{tuple(expected.shape)} was expected"
            )
    compare_fingerprints(base, layers, check_base)

    device = {
        key: weight_of(layers[path]).device
        for path, leaves in by_path(tensors).items()
        if path in layers
        for key, _ in leaves.values()
    }
    first = weight_of(next(iter(layers.values()))).device  # of tensors that all layers share
    # cloned: safetensors hands tensors out at 8-byte alignment, where the CPU's matrix kernels differ in the last bits
    placed = {key: tensors[key].clone().to(device.get(key, first)) for key in {**trainable, **stored}}
    if rebuilt:
        placed |= rebuild(rebuilt, assigned, layers, placed)
    params = {key: placed[key] for key in trainable}
    adapter = Adapter(
        assigned,
        {key: leaf.shape for key, leaf in params.items()},
        {key: placed[key] for key in frozen},
        base,
        next((leaf.dtype for leaf in params.values()), torch.float32),
    )
    adapter.remember(model)
    return adapter, params


@torch.no_grad()
def rebuild(
    keys: list[str], variants: Mapping[str, Variant], layers: Mapping[str, nn.Module], leaves: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The constants that a file leaves out, from the weights of the model. Raises LoraFuncError for one that cannot be."""
    own = by_path(leaves)
    found = {}
    for path, variant in variants.items():
        given = {name: leaf for name, (_, leaf) in own.get(path, {}).items()}
        weight = weight_of(layers[path])
        for name, leaf in variant.rebuild(weight, given).items():
            found[flat_key(path, name)] = leaf.to(weight.device).contiguous()
    if unknown := [key for key in keys if key not in found]:
        raise LoraFuncError(f"the file leaves out {listing(unknown)}, which cannot be rebuilt from the weights")
    return {key: found[key] for key in keys}


def rebuildable(adapter: Adapter) -> list[str]:
    """The flat keys of the constants that their variants can rebuild. Raises LoraFuncError where there are none."""
    own = by_path(adapter.frozen)
    keys = []
    for path, variant in adapter.variants.items():
        leaves = {name: leaf.to("meta") for name, (_, leaf) in own.get(path, {}).items()}
        weight = Weight(torch.empty(adapter.base[path].shape, device="meta"))
        keys += [flat_key(path, name) for name in variant.rebuild(weight, leaves)]
    if not keys:
        kinds = listing(dict.fromkeys(type(variant).__name__ for variant in adapter.variants.values()))
        raise LoraFuncError(f"frozen='rebuild', and {kinds} has no constants that can be rebuilt: leave it out")
    return keys


def plain_fields(variant: Variant) -> dict[str, Any]:
    """The hyperparameters as JSON values. Raises LoraFuncError for a field that is something else."""
    fields = {field.name: getattr(variant, field.name) for field in dataclasses.fields(variant)}
    for name, value in fields.items():
        if not is_plain(value):
            raise LoraFuncError(f"{variant}: a file can store numbers, strings, booleans and None, but {name} is {value!r}")
    return fields


def is_plain(value: object) -> bool:
    """Whether a file can hold `value` as a hyperparameter."""
    return isinstance(value, (bool, int, str, type(None))) or (isinstance(value, float) and math.isfinite(value))


def make_variant(name: str, fields: Mapping[str, Any], catalogue: Mapping[str, type[Variant]]) -> Variant:
    """The inverse of `plain_fields`. Raises LoraFuncError for a name, a field or a value that is not known."""
    if name not in catalogue:
        raise LoraFuncError(
            f"unknown variant {name!r}.{near_misses(str(name), catalogue)} Known are {listing(catalogue, limit=50)}; pass your "
            "own class as load(..., variants=[Mine])"
        )
    known = [field.name for field in dataclasses.fields(catalogue[name])]
    for field, value in fields.items():
        if not is_plain(value):
            raise LoraFuncError(f"field {field!r} of {name!r} is not a number, a string, a boolean or None")
        if field not in known:
            raise LoraFuncError(
                f"unknown field {field!r} of {name!r}.{near_misses(field, known)} Known are {listing(known, limit=50)}"
            )
    return catalogue[name](**fields)


def compare_fingerprints(base: Mapping[str, Base], layers: Mapping[str, nn.Module], check_base: str) -> None:
    """Warns or raises where weights differ from those that the adapter was made on. The meta device has none to compare."""
    changed = []
    for path, known in base.items():
        found = fingerprint(layers[path])
        if known.fingerprint is not None and found is not None and found != known.fingerprint:
            changed.append(path)
    if changed:
        message = (
            f"the adapter was made on another base: the weights of {len(changed)} of {len(base)} adapted layers differ, as of "
            f"{listing(changed, limit=3)}. Load the checkpoint that it was trained on"
        )
        if check_base == "error":
            raise LoraFuncError(message)
        warnings.warn(message + ", or expect other results", stacklevel=4)


def split(content: bytes) -> tuple[dict[str, Any], memoryview]:
    """The JSON header and the data of a safetensors file (its format: 8 bytes of little-endian length, header, data)."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]


def digest(meta: Mapping[str, Any], content: bytes) -> str:
    """SHA-256 of our metadata, of the names, types and places of the tensors, and of their bytes."""
    tensors, data = split(content)
    tensors.pop("__metadata__", None)
    described = json.dumps([meta, tensors], sort_keys=True)
    total = hashlib.sha256(described.encode())
    total.update(data)
    return total.hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Writes beside `path` and renames, so that whatever happens there is the old file or the new one.

    The new one has the mode of the old one, else what the umask leaves. A process that is killed can leave its temporary file
    behind, under a hidden name that ends in .tmp.
    """
    temporary = path.with_name(f".{path.name[:32]}.{secrets.token_hex(4)}.tmp")  # cut: names have at most 255 bytes
    try:
        with open(temporary, "xb") as file:
            if path.exists():
                shutil.copymode(path, temporary)  # before there is anything to read in it
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # Windows and some file systems cannot sync a folder, that is, the rename
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
