"""The format of our files: tensors, and metadata as JSON.

The tensors are the flat dicts of trainable and frozen leaves. The metadata has one entry, JSON
under the key "lora_func":

    format     the version of this layout
    library    the version of lora_func that wrote it
    variants   [[name, {field: value}], ..], each distinct variant once; the value of the field
               "links" of a chain is such a list itself
    targets    {path: [index into variants, d_out, d_in, fingerprint or null]}, with the axes of
               the leaves' own matrices: [.., experts, d_out, d_in, ..] for a stack
    parameters {path: [path of the parameter, whether it is held as [.., d_in, d_out]]} of those
               targets that are no layers
    dropout    the adapter's, if it has any
    frozen     [keys of the tensors that are constants]
    rebuilt    [keys of the constants that the file leaves out]
    digest     SHA-256 of everything else, which tells whether the file was altered

Versions:

    1  the only one so far. Fields that were renamed since are read under their old names
       (`Variant.renamed`): DeLoRA's "init" is "start" now.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from ..engine.sites import Base
from ..errors import LoraFuncError, listing, near_misses
from ..variant import Variant

FORMAT = 1
KEY = "lora_func"
CHUNK = 1 << 24  # bytes that are read at once


class Manifest(NamedTuple):
    """What the metadata of a file says, with its tensors."""

    variants: dict[str, Variant]
    base: dict[str, Base]
    constants: set[str]
    rebuilt: list[str]
    dropout: float
    tensors: dict[str, Tensor]


def parse(path: Path, catalogue: Mapping[str, type[Variant]]) -> Manifest:
    """The manifest of a file. Raises LoraFuncError for a truncated, altered or foreign one.

    Its tensors are mapped from the file, and not in memory: copy what is to stay.
    """
    with open(path, "rb") as file:
        try:
            tensors, header = safetensors.load_file(path), header_of(file)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise LoraFuncError(
                f"not a whole safetensors file, so it was truncated or altered ({error})"
            ) from error
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return parse(path, catalogue)  # `save` has replaced it, between opening and mapping
        return checked(header, tensors, iter(lambda: file.read(CHUNK), b""), catalogue)


def checked(
    header: Mapping[str, Any],
    tensors: dict[str, Tensor],
    chunks: Iterable[bytes],
    catalogue: Mapping[str, type[Variant]],
) -> Manifest:
    """The manifest in the header of a file, whose data is `chunks`."""
    metadata = header.get("__metadata__") or {}
    if KEY not in metadata:
        raise LoraFuncError("a safetensors file, but not one that lora_func.save wrote")
    try:
        meta = json.loads(metadata[KEY])
        if meta["format"] != FORMAT:
            raise LoraFuncError(
                f"the file has format {meta['format']!r}, and this lora_func reads {FORMAT}; "
                "install a newer one"
            )
        if meta.pop("digest") != digest(meta, header, chunks):
            raise LoraFuncError(
                "the file was altered after it was saved: its digest is not that of its content"
            )
        kinds = [make_variant(name, fields, catalogue) for name, fields in meta["variants"]]
        variants, base = {}, {}
        parameters = meta.get("parameters", {})
        for target, (index, *shape, mark) in meta["targets"].items():
            tensor, transposed = parameters.get(target, (None, False))
            numbers = all(type(n) is int and n >= 0 for n in (index, *shape))
            known = tensor is None or (isinstance(tensor, str) and type(transposed) is bool)
            if not numbers or not known or not isinstance(mark, (str, type(None))):
                raise TypeError(f"the entry of target {target!r}")
            if tensor is None and len(shape) != 2:
                raise TypeError(f"the shape of target {target!r}")
            variants[target] = kinds[index]
            base[target] = Base(tuple(shape), mark, transposed, tensor)
        constants, rebuilt = set(meta["frozen"]), meta["rebuilt"]
        dropout = meta.get("dropout", 0.0)
        if type(dropout) is not float or not 0 <= dropout < 1:
            raise TypeError(f"dropout {dropout!r}")
        keys = [*constants, *rebuilt] if type(rebuilt) is list else [None]
        if not variants or not all(isinstance(key, str) for key in keys):
            raise TypeError("no targets, or a key that is not a string")
    except (LoraFuncError, MemoryError):
        raise
    except Exception as error:  # of any kind: a user's own variant may not expect every value
        raise LoraFuncError(
            f"the file was altered: its metadata is not what lora_func.save writes ({error!r})"
        ) from error
    return Manifest(variants, base, constants, rebuilt, dropout, tensors)


def header_of(file: BinaryIO) -> dict[str, Any]:
    """The header of a safetensors file: 8 bytes of little-endian length, the header, the data."""
    return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def serialize(meta: dict[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """The content of a file with its digest, in parts, of which one tensor at most is a copy."""
    header, end = {}, 0
    names = {dtype: dtype_name(dtype) for dtype in {leaf.dtype for leaf in tensors.values()}}
    largest_first = sorted(tensors, key=lambda key: -tensors[key].element_size())  # so all align
    for key in largest_first:
        leaf, start = tensors[key], end
        end += leaf.numel() * leaf.element_size()
        place = {"shape": list(leaf.shape), "data_offsets": [start, end]}
        header[key] = {"dtype": names[leaf.dtype], **place}
    meta = {**meta, "digest": digest(meta, header, (raw(tensors[key]) for key in header))}
    text = json.dumps({"__metadata__": {KEY: json.dumps(meta)}, **header}).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for key in header:
        yield raw(tensors[key])


def raw(leaf: Tensor) -> Any:
    """The bytes of a tensor, as a buffer."""
    return leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors."""
    content = safetensors.save({"": torch.empty(0, dtype=dtype)})
    return header_of(io.BytesIO(content))[""]["dtype"]


def plain_fields(variant: Variant) -> dict[str, Any]:
    """The hyperparameters as JSON values. Raises LoraFuncError for a field that is none.

    The links of a chain become [[name, {field: value}], ..].
    """
    fields = {field.name: getattr(variant, field.name) for field in dataclasses.fields(variant)}
    for name, value in fields.items():
        if isinstance(value, tuple) and all(isinstance(link, Variant) for link in value):
            fields[name] = [[link.name(), plain_fields(link)] for link in value]
        elif not is_plain(value):
            raise LoraFuncError(
                f"{variant}: a file can store numbers, strings, booleans and None, but {name} is "
                f"{value!r}"
            )
    return fields


def is_plain(value: object) -> bool:
    """Whether a file can hold `value` as a hyperparameter."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (bool, int, str, type(None)))


def are_links(value: object) -> bool:
    """Whether `value` is [[name, {field: value}], ..], the links of a chain."""
    return isinstance(value, list) and all(
        isinstance(link, list) and [type(part) for part in link] == [str, dict] for link in value
    )


def make_variant(
    name: str, fields: Mapping[str, Any], catalogue: Mapping[str, type[Variant]]
) -> Variant:
    """The inverse of `plain_fields`. Raises LoraFuncError for an unknown name, field or value."""
    if name not in catalogue:
        raise LoraFuncError(
            f"unknown variant {name!r}.{near_misses(str(name), catalogue)} The known ones are "
            f"{listing(catalogue, limit=50)}; pass your own class as load(..., variants=[Mine])"
        )
    kind = catalogue[name]
    known = [field.name for field in dataclasses.fields(kind)]
    given = {}
    for old, value in fields.items():
        field = kind.renamed.get(old, old)
        links = are_links(value)
        if not links and not is_plain(value):
            raise LoraFuncError(
                f"field {old!r} of {name!r} is not a number, a string, a boolean or None"
            )
        if field not in known:
            raise LoraFuncError(
                f"unknown field {old!r} of {name!r}.{near_misses(old, known)} The known ones are "
                f"{listing(known, limit=50)}"
            )
        given[field] = tuple(make_variant(n, f, catalogue) for n, f in value) if links else value
    return kind(**given)


def digest(meta: Mapping[str, Any], header: Mapping[str, Any], chunks: Iterable[Any]) -> str:
    """SHA-256 of our metadata, of the tensors' names, types and places, and of their bytes."""
    places = {key: place for key, place in header.items() if key != "__metadata__"}
    total = hashlib.sha256(json.dumps([meta, places], sort_keys=True).encode())
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()
