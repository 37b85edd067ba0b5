"""`save`: an adapter and its parameters into one file."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ..engine import stack
from ..engine.adapter import Adapter, check_order
from ..engine.keys import by_path, flat_key
from ..errors import LoraFuncError, listing
from ..variant import Weight
from ..version import __version__
from .atomic import replace_file, writable
from .format import FORMAT, plain_fields, serialize


def save(
    path: str | os.PathLike[str],
    adapter: Adapter,
    params: Mapping[str, Tensor],
    *,
    frozen: str = "store",
) -> None:
    """Writes `adapter` with `params` to one file.

    An older file is replaced only when the new one is whole; the new one gets its mode. A file may
    have any size: tensors are written one by one, and read by `load` in the same way, so neither
    takes memory beyond the parameters themselves. There are no shards.

    Args:
        path: of the file. Its folder must exist.
        adapter: as `adapt` or `load` returned it.
        params: flat key -> tensor, for one adapter.
        frozen: "store" writes all constants. "rebuild" leaves out those that a variant can compute
            from the weights again, such as AntiPaSTO's singular vectors: the file is small, but
            rebuilt constants have other bits on another machine, and differ on another base.
            `save(path, adapter.to(torch.bfloat16), params)` stores constants in half the size.

    Raises:
        LoraFuncError: params that are not the adapter's; a variant whose fields are not plain
            values; a path that cannot be a file.
        OSError: the disk refuses. An existing file survives each of these.
    """
    check_order("save(path, adapter, params)", adapter=adapter)
    adapter.check(params, examples=False)
    if frozen not in ("store", "rebuild"):
        raise LoraFuncError(f"frozen={frozen!r}; expected 'store' or 'rebuild'")
    rebuilt = rebuildable(adapter) if frozen == "rebuild" else []
    real = writable(path)
    variants = list(dict.fromkeys(adapter.variants.values()))
    targets, parameters = {}, {}
    for target, variant in adapter.variants.items():
        base = adapter.base[target]
        targets[target] = [variants.index(variant), *base.shape, base.fingerprint]
        if base.tensor is not None:
            parameters[target] = [base.tensor, base.transposed]
    meta = {
        "format": FORMAT,
        "library": __version__,
        "variants": [[variant.name(), plain_fields(variant)] for variant in variants],
        "targets": targets,
        **({"parameters": parameters} if parameters else {}),
        **({"dropout": adapter.dropout} if adapter.dropout else {}),
        "frozen": [key for key in adapter.frozen if key not in rebuilt],
        "rebuilt": rebuilt,
    }
    stored = {**params, **adapter.frozen}
    kept = {key: stored[key] for key in stored if key not in rebuilt}
    replace_file(real, serialize(meta, kept))


def rebuildable(adapter: Adapter) -> list[str]:
    """The flat keys of the constants that variants can rebuild.

    Raises LoraFuncError if there are none.
    """
    own = by_path(adapter.frozen)
    keys = []
    for path, variant in adapter.variants.items():
        leaves = {name: leaf.to("meta") for name, (_, leaf) in own.get(path, {}).items()}
        weight = Weight(torch.empty(adapter.base[path].shape, device="meta"))
        keys += [flat_key(path, name) for name in stack.rebuild(variant, weight, leaves)]
    if not keys:
        kinds = dict.fromkeys(type(variant).__name__ for variant in adapter.variants.values())
        raise LoraFuncError(
            f"frozen='rebuild' was given, but {listing(kinds)} has no constants that can be "
            "rebuilt: leave it out"
        )
    return keys
