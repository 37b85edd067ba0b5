"""`save`: an adapter and its parameters as a folder that PEFT reads."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from ...engine.adapter import Adapter, check_order
from ...engine.keys import SHARED, flat_key
from ...errors import LoraFuncError, listing
from ...files.atomic import replace_file, writable
from ...libraries import transformers
from ...variants import Full
from .config import CONFIG, WEIGHTS
from .fields import fields_of, inputs_and_outputs, method_of, targets_in
from .method import Method
from .methods.lora import experts, laid_out, lora
from .targets import LEVEL
from .whole import check_apart
from .whole_modules import add_wholes, only_wholes, trained

PREFIX = "base_model.model."
OF_ALL = "base_model."
RELEASE = "0.21.2"  # of PEFT, whose format this is


@torch.no_grad()
def save(
    folder: str | os.PathLike[str],
    adapter: Adapter,
    params: Mapping[str, Tensor],
    *,
    model: nn.Module | None = None,
    base: str | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, as PEFT does.

    Each file is replaced only when the new one is whole. A save that is interrupted leaves the old
    adapter, the new one, or a folder without a config, which nobody can load: never a mixture.

    Args:
        folder: is made if its parent exists.
        adapter: as `adapt` or `load` returned it.
        params: flat key -> tensor, for one adapter.
        model: the base model. The config then names layers by the last parts of their paths, if
            these name no others, which some tools expect. It is needed for what is no linear layer:
            embeddings, convolutions, parameters, and `Full`, of which PEFT stores whole weights.
        base: name or path of the base model, for the config. None: what the model calls itself.

    Raises:
        LoraFuncError: params that are not the adapter's, or that have an example axis; a variant
            that PEFT does not have; variants or fields that one config cannot hold; a path that
            cannot be a folder. Nothing is written then.
        OSError: the disk refuses.
    """
    check_order("save(folder, adapter, params)", adapter=adapter)
    if model is not None:
        check_order("save(folder, adapter, params, model=model)", model=model)
    adapter.check(params, examples=False)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise LoraFuncError(f"{str(folder)!r} is a file, where a folder would stand")
    if not folder.parent.is_dir():
        raise LoraFuncError(
            f"{str(folder)!r} cannot be made: there is no {str(folder.parent)!r}; make it first"
        )
    weights: dict[str, Any] = {} if model is None else dict(adapter.weights(model))
    config, tensors = exported(adapter, params, weights, model)
    if base is None:
        base = getattr(model, "name_or_path", None) or None
    common = {"base_model_name_or_path": base, "peft_version": RELEASE, "inference_mode": True}
    config = {**common, **config}
    own = {key: leaf.detach().cpu().contiguous().clone() for key, leaf in tensors.items()}
    folder.mkdir(exist_ok=True)
    write(folder, json.dumps(config, indent=2).encode(), safetensors.save(own, {"format": "pt"}))


def write(folder: Path, config: bytes, tensors: bytes) -> None:
    """Writes the two files: first an old config that differs goes, and last the new one comes."""
    weights, place = writable(folder / WEIGHTS), writable(folder / CONFIG)
    if place.exists() and place.read_bytes() != config:
        place.unlink()
    replace_file(weights, tensors)
    replace_file(place, config)


def exported(
    adapter: Adapter,
    params: Mapping[str, Tensor],
    weights: Mapping[str, Any],
    model: nn.Module | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a folder."""
    leaves = {path: adapter.params_of(path, params) for path in adapter.variants}
    full = {path: leaves[path] for path, v in adapter.variants.items() if type(v) is Full}
    check_model_given(adapter, full, model)
    wholes = trained(full, weights, model) if model is not None else {}
    variants = {path: v for path, v in adapter.variants.items() if path not in full}
    if not variants and model is not None:
        config, tensors = only_wholes(wholes, model)
        return config, {PREFIX + key: tensor for key, tensor in tensors.items()}
    methods = {path: method_of(variant) for path, variant in variants.items()}
    config = fields_of(variants, methods, leaves)
    sites = {path: placed(adapter, path, methods[path], weights, model) for path in variants}
    config |= named(sites, model)
    method = next(iter(methods.values()))
    if method.peft_type == "IA3":
        config |= inputs_and_outputs(variants, config["target_modules"])
    add_dropout(config, adapter, method)
    tensors = {}
    for number, (path, site) in enumerate(sites.items()):
        tensors |= site_tensors(site, leaves[path], number, depth(site, sites))
        check_constants(adapter, path, site.method, config)
    paths = [site.module for site in sites.values()]
    own = add_wholes(config, wholes, paths, model)
    tensors |= {PREFIX + key: tensor for key, tensor in own.items()}
    return config, {**tensors, **shared_tensors(adapter, params, method, paths)}


def check_model_given(adapter: Adapter, full: Mapping[str, Any], model: nn.Module | None) -> None:
    """Raises LoraFuncError if the folder holds what only the model knows, and there is none."""
    if model is not None:
        return
    if full:
        raise LoraFuncError(
            f"{listing(full)}: PEFT stores whole weights where lf.Full holds a difference. Give "
            "the model too, as in save(folder, adapter, params, model=model)"
        )
    if parameters := [path for path, base in adapter.base.items() if base.tensor is not None]:
        raise LoraFuncError(
            f"{listing(parameters)}: how PEFT lays out what is no linear layer depends on the "
            "model. Give it too, as in save(folder, adapter, params, model=model)"
        )


class Placed(NamedTuple):
    """Where PEFT's file has the tensors of a site."""

    module: str  # path of the module
    parameter: str | None  # its parameter, if the config names that
    method: Method


def placed(
    adapter: Adapter, path: str, method: Method, weights: Mapping[str, Any], model: Any
) -> Placed:
    """Where one site stands. Raises LoraFuncError for a parameter that PEFT does not reach."""
    tensor = adapter.base[path].tensor
    if tensor is None:
        return Placed(path, None, method)
    weight = weights[path]
    check_apart({path: weight}, set(), model)
    if tensor != path:
        return Placed(path, None, laid_out(method, weight))
    module, _, name = path.rpartition(".")
    if method is not lora or not weight.layout.is_matrix or weight.layout.kernel or not module:
        raise LoraFuncError(
            f"{path!r} is a parameter, where PEFT has only a plain LoRA of matrices and stacks of "
            f"them, and not {adapter.variants[path]}"
        )
    return Placed(module, name, experts(weight))


def named(sites: Mapping[str, Placed], model: nn.Module | None) -> dict[str, Any]:
    """The fields that say what is adapted."""
    modules = None if model is None else [path for path, _ in model.named_modules() if path]
    parameters = None if model is None else [path for path, _ in model.named_parameters()]
    layers = [path for path, site in sites.items() if site.parameter is None]
    rest = [path for path in sites if path not in layers]
    fields: dict[str, Any] = {"target_modules": targets_in(layers, modules) if layers else []}
    if rest:
        fields["target_parameters"] = targets_in(rest, parameters)
    if model is not None and any(
        transformers.is_conv1d(model.get_submodule(path)) for path in layers
    ):
        fields["fan_in_fan_out"] = True
    return fields


def depth(site: Placed, sites: Mapping[str, Placed]) -> int:
    """How many wrappers of PEFT's are around that of a site: one for each later parameter."""
    together = [other for other in sites.values() if other.module == site.module]
    return len(together) - 1 - together.index(site)


def site_tensors(
    site: Placed, leaves: Mapping[str, Tensor], number: int, level: int
) -> dict[str, Tensor]:
    """The tensors of one site, `level` wrappers deep, by their keys."""
    method, found = site.method, {}
    for name, leaf in {**method.leaves, **method.constants}.items():
        if name not in leaves:
            continue
        key = f"{PREFIX}{site.module}{level * LEVEL}.{leaf.key}"
        if name in method.numbered:
            key = f"{OF_ALL}{leaf.key}.{number}"
        tensor = leaf.theirs(leaves[name])
        found[key] = torch.cat([found[key], tensor]) if key in found else tensor
    return found


def shared_tensors(
    adapter: Adapter, params: Mapping[str, Tensor], method: Method, paths: list[str]
) -> dict[str, Tensor]:
    """The tensors of all layers, by their keys; and their copies in each layer, where PEFT has
    these."""
    held, found = {**params, **adapter.frozen}, {}
    for name, leaf in method.shared.items():
        tensor = leaf.theirs(held[flat_key(SHARED, name)])
        places = [OF_ALL, *(f"{PREFIX}{path}." for path in paths if method.copied)]
        found |= {place + leaf.key: tensor for place in places}
    return found


def check_constants(adapter: Adapter, path: str, method: Method, config: Mapping[str, Any]) -> None:
    """Raises LoraFuncError if a layer has other constants than PEFT will draw for it."""
    if method.place is None:
        return
    own = method.place(config, adapter.variants[path], adapter.base[path].shape)
    for name, wanted in own.items():
        given = adapter.frozen[flat_key(path, name)]
        if not torch.equal(given.cpu(), wanted):
            raise LoraFuncError(
                f"{path!r} has constants {name!r} of its own, and PEFT draws those of "
                f"{method.kind.__name__} from a seed and has no place for others in its file. "
                "Adapters that came from PEFT with its default seed can go back. Otherwise merge"
            )


def add_dropout(config: dict[str, Any], adapter: Adapter, method: Method) -> None:
    """Adds the dropout to the config; warns if the method has none in PEFT."""
    if method.dropout is not None:
        config[method.dropout] = adapter.dropout
    elif adapter.dropout:
        warnings.warn(
            f"dropout={adapter.dropout} is left out: {method.peft_type} has none in PEFT, and it "
            "acts in training alone",
            stacklevel=4,
        )
