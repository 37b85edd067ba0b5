"""`save`: an adapter and its parameters into one file."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ..engine.adapter import Adapter
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

    It replaces an older file only once it is whole, and keeps its mode.

    Args:
        frozen: "rebuild" leaves out the constants that a variant can compute from the weights
            again, as the SVD of each layer of AntiPaSTO: a small file, which gives other bits on
            another machine, and another adapter on another base. To store constants in half the
            size, `save(path, adapter.to(torch.bfloat16), params)`.

    Raises:
        LoraFuncError: params that are not the adapter's; a variant whose fields are not plain
            values; a path that cannot be a file.
        OSError: the disk refuses. An existing file survives each of these.
    """
    adapter.check(params, examples=False)
    if frozen not in ("store", "rebuild"):
        raise LoraFuncError(f"frozen={frozen!r}; expected 'store' or 'rebuild'")
    rebuilt = rebuildable(adapter) if frozen == "rebuild" else []
    real = writable(path)
    variants = list(dict.fromkeys(adapter.variants.values()))
    targets = {}
    for target, variant in adapter.variants.items():
        base = adapter.base[target]
        targets[target] = [variants.index(variant), *base.shape, base.fingerprint]
    meta = {
        "format": FORMAT,
        "library": __version__,
        "variants": [[variant.name(), plain_fields(variant)] for variant in variants],
        "targets": targets,
        "frozen": [key for key in adapter.frozen if key not in rebuilt],
        "rebuilt": rebuilt,
    }
    stored = {**params, **adapter.frozen}
    content = serialize(meta, {key: stored[key] for key in stored if key not in rebuilt})
    replace_file(real, content)


def rebuildable(adapter: Adapter) -> list[str]:
    """The flat keys of the constants that variants can rebuild.

    Raises LoraFuncError if there are none.
    """
    own = by_path(adapter.frozen)
    keys = []
    for path, variant in adapter.variants.items():
        leaves = {name: leaf.to("meta") for name, (_, leaf) in own.get(path, {}).items()}
        weight = Weight(torch.empty(adapter.base[path].shape, device="meta"))
        keys += [flat_key(path, name) for name in variant.rebuild(weight, leaves)]
    if not keys:
        kinds = dict.fromkeys(type(variant).__name__ for variant in adapter.variants.values())
        raise LoraFuncError(
            f"frozen='rebuild', and {listing(kinds)} has no constants that can be rebuilt: leave "
            "it out"
        )
    return keys
