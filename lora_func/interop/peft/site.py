"""One adapted layer of a folder: its variant, its leaves and its constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...engine import stack
from ...errors import LoraFuncError
from ...precision import autocast_off
from ...variant import Params, Variant, Weight
from ...weights.table import Snapshot
from .config import variant_of
from .method import Folder, Leaf
from .targets import Target


def take_numbered(target: Target, index: int, rest: dict[str, Tensor]) -> None:
    """Takes the tensors of a target that stand at the model under its number from the rest."""
    for name in target.method.numbered:
        key = target.method.leaves[name].key
        if f"{key}.{index}" in rest:
            target.tensors[key] = rest.pop(f"{key}.{index}")


def site(config: Mapping[str, Any], target: Target) -> tuple[Variant, Any, Params]:
    """The variant of a target, its weight and its leaves.

    Raises LoraFuncError for tensors that are missing, of another shape, or too many.
    """
    method, weight = target.method, target.weight
    shape = tuple(weight.shape)
    variant = variant_of(method, Folder(config, target.tensors, target.path, shape))
    given = read_leaves({**method.leaves, **method.constants}, target)
    expected = expected_leaves(variant, shape, given)
    for name, leaf in {**method.leaves, **method.constants}.items():
        if name in expected and name not in given:
            raise LoraFuncError(f"the file lacks its tensor {leaf.key!r}")
        if name in given and name not in expected:
            raise LoraFuncError(f"the file has a tensor {leaf.key!r}, which {variant} has not")
        if name in given and given[name].shape != expected[name].shape:
            raise LoraFuncError(
                f"its tensor {leaf.key!r} has shape {tuple(target.tensors[leaf.key].shape)}, "
                f"which is not that of {variant} on a weight of shape {shape}"
            )
    trained = {name: given[name] for name in method.leaves if name in given}
    frozen = {name: given[name] for name in method.constants if name in given}
    if method.place is not None:
        frozen |= method.place(config, variant, shape)
    if method.derived:
        frozen |= derived(variant, weight)
    return variant, weight, Params(trained, frozen)


def read_leaves(leaves: Mapping[str, Leaf], target: Target) -> dict[str, Tensor]:
    """Our leaves, from PEFT's tensors. Raises LoraFuncError for one with other axes."""
    found = {}
    for name, leaf in leaves.items():
        if (tensor := target.tensors.get(leaf.key)) is not None:
            try:
                found[name] = leaf.ours(tensor).contiguous()
            except (RuntimeError, IndexError) as error:
                raise LoraFuncError(
                    f"its tensor {leaf.key!r} has shape {tuple(tensor.shape)}, which PEFT does not "
                    f"write ({error})"
                ) from error
    return found


def expected_leaves(
    variant: Variant, shape: tuple[int, ...], leaves: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Short name -> a tensor on the device "meta", of the shape that the variant has there."""
    with torch.device("meta"):
        given = {name: leaf.to("meta") for name, leaf in leaves.items()}
        drawn = stack.like(variant, Weight(torch.empty(shape)), given)
    return {**drawn.trainable, **drawn.frozen}


def derived(variant: Variant, weight: Any) -> dict[str, Tensor]:
    """The constants that `init` reads off the weight."""
    if weight.device.type == "meta":
        raise LoraFuncError(
            f"{variant} reads the weight, which has no values on the device 'meta': load those of "
            "the model first"
        )
    with autocast_off(weight.device):
        return dict(stack.init(variant, Snapshot(weight), torch.Generator(), None).frozen)


def shared_leaves(
    config: Mapping[str, Any],
    targets: list[Target],
    tensors: Mapping[str, Tensor | None],
    variants: Mapping[str, Variant],
) -> Params:
    """What all layers share. Raises LoraFuncError if it is missing, or of another shape."""
    method = targets[0].method
    shapes = [target.weight.shape for target in targets]
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if method.draw is not None and not given and not config.get("save_projection", True):
        largest = tuple(max(shape[axis] for shape in shapes) for axis in (0, 1))
        given = dict(method.draw(config, largest))
    with torch.device("meta"):
        weights = [Weight(torch.empty(shape)) for shape in shapes]
        expected = variants[targets[0].path].init_shared(weights, None)
    for name, wanted in {**expected.trainable, **expected.frozen}.items():
        key = method.shared[name].key
        if name not in given:
            raise LoraFuncError(
                f"the file lacks {key!r}, which all layers share. If it was left out "
                "(save_projection=false), load it in PEFT and save it with save_projection=True"
            )
        if given[name].shape != wanted.shape:
            raise LoraFuncError(
                f"{key!r} has shape {tuple(given[name].shape)}, where {tuple(wanted.shape)} was "
                "expected for these layers"
            )
    return Params(
        {name: given[name] for name in expected.trainable},
        {name: given[name] for name in expected.frozen},
    )
