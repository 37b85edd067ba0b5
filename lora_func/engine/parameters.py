"""Parameters as targets: whatever of a model is not a linear layer that is called."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import LoraFuncError, listing, near_misses
from ..libraries import torch_hooks
from ..variant import Variant
from ..weights.parameter import ParameterWeight
from .messages import missing_parameter
from .sites import Base, Found

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def holders(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Path of each parameter -> the module that holds it and its name there.

    A parameter that several modules hold comes once, under its first path.
    """
    found, seen = {}, set()
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}.{name}".removeprefix(".")] = module, name
    return found


def rows_or_kernel(model: nn.Module, asked: Collection[str]) -> dict[str, nn.Module]:
    """path -> module, for embeddings and convolutions that a pattern names.

    The last part of the path is what names one: "embed_tokens" does, "model" does not.
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, EMBEDDINGS) or torch_hooks.is_convolution(module):
            masked = f"{path.rpartition('.')[0]}.\0".removeprefix(".")
            if any(re.search(p, path) and not re.search(p, masked) for p in asked):
                found[path] = module
    return found


def parameter_of(model: nn.Module, path: str, base: Base) -> ParameterWeight:
    """The parameter of `model` that is the target at `path`.

    Raises LoraFuncError if it is missing, has another layout, or cannot be adapted.
    """
    parts = str(base.tensor).split(".")
    module: Any = model
    for part in parts[:-1]:
        module = None if module is None else module._modules.get(part)
    if module is None or module._parameters.get(parts[-1]) is None:
        raise LoraFuncError(missing_parameter(model, str(base.tensor)))
    weight = ParameterWeight(module, parts[-1], str(base.tensor))
    layout = weight.layout
    if layout.shape != base.shape or layout.transposed != base.transposed:
        turned = {True: ", held transposed", False: ""}
        raise LoraFuncError(
            f"the parameter {path!r} is {layout.shape}{turned[layout.transposed]} in this "
            f"{type(model).__name__}, but was {base.shape}{turned[base.transposed]} in the model "
            "that the adapter was made for"
        )
    # A trace cannot ask for all of it, and a model that is compiled was called before.
    problem = None if torch.compiler.is_compiling() else weight.problem()
    if problem is not None:
        raise LoraFuncError(f"the parameter {path!r} {problem}")
    return weight


def check_site(path: str, variant: Variant, weight: ParameterWeight) -> None:
    """Raises LoraFuncError if a variant cannot adapt a parameter."""
    card, kind, shape = variant.card, type(variant).__name__, tuple(weight.stored.shape)
    if not (weight.layout.is_matrix or card.any_shape):
        raise LoraFuncError(
            f"the parameter {path!r} of shape {shape} is no matrix and no stack of matrices, which "
            f"{kind} adapts: take lf.Full() for it, as in {{{path!r}: lf.Full()}}"
        )
    if type(variant).merged is Variant.merged:
        raise LoraFuncError(
            f"{path!r} is a parameter, and {kind} has no closed form of its weight: it adapts "
            "layers that are called, such as linear ones"
        )
    if card.data == "required":
        raise LoraFuncError(
            f"{path!r} is a parameter, and {kind} starts from data that a layer sees, which "
            "calibration cannot tell here. Take another variant for it"
        )


def drop_second_sides(chosen: dict[str, Variant], layers: Mapping[str, nn.Module]) -> None:
    """Leaves out linear layers whose weight is that of a chosen embedding: its adapter is theirs.

    Raises LoraFuncError if the two are to have different variants.
    """
    tables = {
        id(layer._parameters.get("weight")): path
        for path, layer in layers.items()
        if isinstance(layer, EMBEDDINGS) and path in chosen
    }
    for path in list(chosen):
        weight = layers[path]._parameters.get("weight") if path in layers else None
        table = tables.get(id(weight), path)
        if table != path:
            if chosen[path] != chosen[table]:
                raise LoraFuncError(
                    f"{table!r} and {path!r} are one tensor, which takes one adapter, but the "
                    f"rules name {chosen[table]} and {chosen[path]}"
                )
            del chosen[path]


def say_passed_over(
    patterns: Collection[str], taken: Collection[str], known: Collection[str]
) -> None:
    """Warns of parameters that a pattern names beside layers: it is one for layers then.

    As for embeddings, what names one is the last part of the path, of its module or its own.
    """
    left = []
    for path in known:
        parts = path.split(".")
        if path not in taken and ".".join(parts[:-1]) not in taken:
            masked = ".".join([*parts[:-2], "\0", "\0"])
            if any(re.search(p, path) and not re.search(p, masked) for p in patterns):
                left.append(path)
    if left:
        warnings.warn(
            f"a pattern names layers, and also the parameters {listing(left)}, which are left out. "
            "Name these by a pattern of their own, or as Targets(parameters=..)",
            stacklevel=5,
        )


def say_shared(model: nn.Module, found: Sequence[Found]) -> None:
    """Warns of adapted parameters that several modules hold: the adapter acts in all of them."""
    users = defaultdict(list)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            users[id(parameter)].append(f"{path}.{name}".removeprefix("."))
    for site in found:
        paths = users[id(site.weight.stored)] if isinstance(site.weight, ParameterWeight) else []
        if len(paths) > 1:
            warnings.warn(
                f"{listing(paths)} are one tensor, so one adapter acts in all of them",
                stacklevel=4,
            )


def check_once(layers: Mapping[str, nn.Module], parameters: Mapping[str, ParameterWeight]) -> None:
    """Raises LoraFuncError if a parameter is the weight of a layer that is adapted too."""
    users = {id(layer._parameters.get("weight")): path for path, layer in layers.items()}
    for path, parameter in parameters.items():
        if id(parameter.stored) in users:
            raise LoraFuncError(
                f"{path!r} is the weight of {users[id(parameter.stored)]!r}, which is adapted as a "
                "layer: name one of the two"
            )


def no_parameter(pattern: str, model: nn.Module, known: Sequence[str]) -> str:
    """Why a pattern matches no parameter, for an error."""
    if held := second_holder(pattern, model):
        return held
    parts = [part for path in known for part in (path.rsplit(".", 1)[-1], path)]
    kinds = dict.fromkeys(re.sub(r"\d+", "N", path) for path in known)
    near = near_misses(pattern.strip("^$.\\"), parts)
    return f"{near} The parameters of {type(model).__name__} are {listing(kinds, limit=12)}"


def second_holder(pattern: str, model: nn.Module) -> str:
    """For an error: a parameter with two paths, of which a pattern matches the later one."""
    first = {id(module._parameters[name]): path for path, (module, name) in holders(model).items()}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            own = f"{path}.{name}".removeprefix(".")
            known = first.get(id(parameter), own)
            if own != known and re.search(pattern, own):
                return f" It is the tensor of {known!r}, which is adapted under that path"
    return ""
