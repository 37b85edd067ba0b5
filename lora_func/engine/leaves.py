"""The leaves of all layers, as flat dicts: drawn, or blank on the device "meta"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from ..errors import LoraFuncError, listing, near_misses
from ..precision import autocast_off
from ..variant import Params, Variant, Weight
from ..weights.parameter import ParameterWeight
from ..weights.table import Snapshot
from . import stack
from .collect import Collected, all_finite
from .keys import SHARED, by_path, flat_key
from .sites import Base, Found


class Leaves:
    """Trainable and frozen leaves, as two flat dicts."""

    def __init__(self) -> None:
        self.trainable: dict[str, Tensor] = {}
        self.frozen: dict[str, Tensor] = {}
        self.sharing: set[Variant] = set()  # variants whose layers share tensors

    def add(self, path: str, drawn: Params, device: torch.device) -> None:
        """Adds what a variant returned for one layer, on the device of the layer."""
        leaves = drawn.trainable | drawn.frozen
        if device.type != "meta" and any(leaf.is_meta for leaf in leaves.values()):
            raise LoraFuncError(
                f'{path!r}: the layer is on {device}, and its parameters were drawn on "meta", '
                'without data: call outside of torch.device("meta")'
            )
        for name, leaf in drawn.trainable.items():
            self.trainable[flat_key(path, name)] = leaf.to(device).contiguous()
        for name, leaf in drawn.frozen.items():
            self.frozen[flat_key(path, name)] = leaf.to(device).contiguous()


@torch.no_grad()
def draw(
    found: Sequence[Found],
    generator: torch.Generator | None,
    stats: Mapping[str, Any] | None = None,
    seen: Callable[[Found, Weight], None] = lambda site, snapshot: None,
) -> Leaves:
    """Fresh leaves of all layers. Raises LoraFuncError, with the path of the layer.

    Each dense matrix is read once at most. `seen` gets it before it is dropped.
    """
    leaves = Leaves()
    weights = {site.path: site.weight for site in found}
    add_shared(leaves, {site.path: site.variant for site in found}, weights, generator)
    for site in found:
        snapshot = Snapshot(site.weight)
        try:
            with autocast_off(site.weight.device):  # it would round decompositions
                own = (stats or {}).get(site.path)
                drawn = stack.init(site.variant, snapshot, generator, own)
            seen(site, snapshot)
        except (LoraFuncError, LinAlgError) as error:
            raise LoraFuncError(f"{site.path!r}: {error}") from error
        if not all_finite([drawn.trainable, drawn.frozen]):
            raise LoraFuncError(
                f"{site.path!r}: the parameters of {site.variant} start with NaN or infinite "
                "entries, because the weight of the layer has some"
            )
        leaves.add(site.path, drawn, site.weight.device)
    return leaves


def blank(
    variants: Mapping[str, Variant], base: Mapping[str, Base], given: Mapping[str, Tensor]
) -> Leaves:
    """Leaves of the names, shapes and dtypes that `draw` would return, on the device "meta".

    `given`: flat leaves, for shapes that depend on data.
    """
    leaves, own = Leaves(), by_path(given)
    with torch.device("meta"):
        weights = {path: Weight(torch.empty(base[path].shape)) for path in variants}
        add_shared(leaves, variants, weights, None)
        for path, variant in variants.items():
            known = {name: leaf for name, (_, leaf) in own.get(path, {}).items()}
            own_leaves = stack.like(variant, weights[path], known)
            leaves.add(path, own_leaves, torch.device("meta"))
    return leaves


def add_shared(
    leaves: Leaves,
    variants: Mapping[str, Variant],
    weights: Mapping[str, Weight],
    generator: torch.Generator | None,
) -> None:
    """Adds the tensors that all layers of a variant share."""
    owner: dict[str, Variant] = {}
    for variant in dict.fromkeys(variants.values()):
        group = [stack.first(weights[path]) for path, own in variants.items() if own == variant]
        shared = variant.init_shared(group, generator)
        for name in shared.trainable | shared.frozen:
            if name in owner:
                raise LoraFuncError(
                    f"{owner[name]} and {variant} both share a tensor called {name!r} between "
                    "layers; adapt them apart"
                )
            owner[name] = variant
        leaves.add(SHARED, shared, group[0].device)
    leaves.sharing.update(owner.values())


def check_stats(found: Sequence[Found], stats: Mapping[str, Any] | None) -> None:
    """Raises LoraFuncError unless `stats` has, for each layer, what its variant looks at."""
    if stats is None:
        return
    if not isinstance(stats, Mapping):
        raise LoraFuncError(
            f"stats must be a mapping path -> what collect found, not {type(stats).__name__}"
        )
    looking = [
        site
        for site in found
        if site.variant.looks_at_data and not isinstance(site.weight, ParameterWeight)
    ]
    if not looking:
        raise LoraFuncError(f"stats= was given, but {kinds(found)} looks at no data: leave it out")
    if missing := [site.path for site in looking if site.path not in stats]:
        raise LoraFuncError(
            f"stats has nothing for {listing(missing)}.{near_misses(missing[0], stats)}"
        )
    sources = stats.statistics if isinstance(stats, Collected) else {}
    for path, variant, weight in looking:
        wanted, source = variant.statistic, sources.get(path)
        if wanted is None:
            continue
        if source is not None and source != wanted:
            raise LoraFuncError(
                f"stats of {path!r} were collected by {source}, but {variant} looks at {wanted}: "
                "collect them with variant.statistic"
            )
        try:
            wanted.check(stats[path], weight)
        except LoraFuncError as error:
            raise LoraFuncError(f"stats of {path!r}, for {variant}: {error}") from error
        if not all_finite(stats[path]):
            raise LoraFuncError(f"stats of {path!r} have NaN or infinite entries")


def kinds(found: Iterable[Found]) -> str:
    """The classes of the variants, for a message."""
    return listing(dict.fromkeys(type(site.variant).__name__ for site in found))
