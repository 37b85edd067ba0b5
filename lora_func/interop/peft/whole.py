"""Whole tensors of a folder, beside the method's own: what PEFT trains as it is.

They come from `modules_to_save`, `bias`, `trainable_token_indices` and LN tuning. Here each is a
`Full`, which holds its difference from the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import LoraFuncError, listing
from ...precision import at_least_float32
from ...weights.layer import LayerWeight
from ...weights.parameter import ParameterWeight
from ...weights.table import kind_of, read

ROWS = "trainable_tokens_delta"
BASE = ".base_layer."
WRAPPERS = (".token_adapter", ".base_layer", ".ln_tuning_layers")  # PEFT's, around a module


class Whole(NamedTuple):
    """A `Full` on a layer or on a parameter."""

    weight: LayerWeight | ParameterWeight
    leaves: dict[str, Tensor]


def wholes(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module
) -> tuple[dict[str, Whole], set[str]]:
    """path -> the Full there, from the tensors that no leaf of the method takes.

    And the paths of parameters that several modules hold, and PEFT changes in all of them. Raises
    LoraFuncError for a tensor that the model has not, or has in another shape.
    """
    given: dict[str, Tensor] = {}
    together: set[str] = set()
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        for wrapper in WRAPPERS:
            path = path.removesuffix(wrapper)
        module = submodule(model, path)
        if module is not None and name == ROWS:
            whole, name = with_rows(module, tensor, rows_of(config, path, key)), "weight"
            together.add(f"{path}.weight")
        else:
            whole = tensor
        held = None if module is None else held_by(module, name)
        if module is None or held is None:
            raise LoraFuncError(unexpected(key, config))
        if held.shape != whole.shape:
            raise LoraFuncError(
                f"{key!r} has shape {tuple(whole.shape)}, and in this model {tuple(held.shape)}. "
                "Give the model the same vocabulary and head first"
            )
        if name in module._parameters and not (BASE in key and name == "weight"):
            given[f"{path}.{name}"] = whole
        elif not torch.equal(held.detach().to(whole), whole):
            raise LoraFuncError(
                f"{key!r} is another one in this model, and the adapter was made for that in the "
                "folder. Load it into the model first"
            )
    for paths in users(model).values():
        alike = [path for path in paths if is_same(given.get(path), given.get(paths[0]))]
        if len(paths) > 1 and alike == paths:
            together.add(paths[0])
            for path in paths[1:]:
                del given[path]
    found: dict[str, Whole] = {}
    for key, tensor in given.items():
        path, _, name = key.rpartition(".")
        add(found, path, model.get_submodule(path), name, tensor, together=key in together)
    return found, together


def users(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> its paths, one for each module that holds it."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            found.setdefault(id(parameter), []).append(f"{path}.{name}".removeprefix("."))
    return {held: paths for held, paths in found.items() if held != id(None)}


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are there and equal."""
    return a is not None and b is not None and torch.equal(a, b)


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def held_by(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or a buffer of a module, dequantized if it is packed; None if it has none."""
    if name == "weight" and kind_of(module):
        weight = read("", module)
        return weight.as_stored(weight.dense())
    held = module._parameters.get(name)
    return module._buffers.get(name) if held is None else held


def unexpected(key: str, config: Mapping[str, Any]) -> str:
    """The message for a tensor that belongs nowhere."""
    return (
        f"unexpected tensor {key!r}: it is no part of {config['peft_type']}, and the model has no "
        "parameter there. Load it onto the class of model that the adapter was made for"
    )


def rows_of(config: Mapping[str, Any], path: str, key: str) -> list[int]:
    """The rows of an embedding that PEFT trains."""
    rows = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(rows, dict):
        rows = next((own for name, own in rows.items() if path.endswith(name)), None)
    if not isinstance(rows, list) or not all(type(row) is int for row in rows):
        raise LoraFuncError(f"the config does not say which rows {key!r} holds")
    return rows


def with_rows(module: nn.Module, tensor: Tensor, rows: list[int]) -> Tensor:
    """The weight of a module with some rows replaced."""
    weight = held_by(module, "weight")
    fits = weight is not None and tensor.shape == (len(rows), weight.shape[-1])
    if weight is None or not fits or not all(0 <= row < len(weight) for row in rows):
        shape = None if weight is None else tuple(weight.shape)
        raise LoraFuncError(
            f"the config has {len(rows)} trainable token indices, up to {max(rows, default=0)}, "
            f"with a tensor of shape {tuple(tensor.shape)}, for a weight of shape {shape}"
        )
    whole = at_least_float32(weight.detach()).clone()
    whole[rows] = tensor.to(whole)
    return whole


def add(
    found: dict[str, Whole],
    path: str,
    module: nn.Module,
    name: str,
    tensor: Tensor,
    *,
    together: bool,
) -> None:
    """Adds the difference of one parameter: to its layer, or by itself if that is `together`."""
    layer = kind_of(module) is not None and not together
    if layer and name == "weight":
        weight = read(path, module)
        leaves = {"D": difference(weight.as_stored(tensor), weight.dense())}
        if weight.bias is not None:
            leaves["d"] = torch.zeros(weight.bias.shape, dtype=torch.float32)
        bias = found.pop(f"{path}.bias", None)
        found[path] = Whole(weight, leaves if bias is None else {**leaves, "d": bias.leaves["D"]})
    elif layer and name == "bias" and path in found:
        found[path].leaves["d"] = difference(tensor, module._parameters[name])
    else:
        parameter = ParameterWeight(module, name, f"{path}.{name}".removeprefix("."))
        if problem := parameter.problem():
            raise LoraFuncError(f"the parameter {parameter.path!r} {problem}")
        D = difference(tensor, parameter.stored)
        found[parameter.path] = Whole(parameter, {"D": parameter.layout.matrix(D)})


def difference(tensor: Tensor, base: Any) -> Tensor:
    """What a Full adds, at least in float32."""
    base = at_least_float32(base.detach())
    return tensor.to(base.device, base.dtype) - base


def check_apart(weights: Mapping[str, Any], together: set[str], model: nn.Module) -> None:
    """Raises LoraFuncError for a parameter that two modules hold, where PEFT changes only one.

    `together` are those that it changes in all.
    """
    known = users(model)
    for path, weight in weights.items():
        paths = known[id(weight.stored)] if isinstance(weight, ParameterWeight) else []
        if len(paths) > 1 and path not in together:
            raise LoraFuncError(
                f"{listing(paths)} are one tensor in this model, of which PEFT changes only "
                f"{weight.path!r}. Untie them first (tie_word_embeddings=False)"
            )
