"""`adapter_config.json` for the variants of an adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ...errors import LoraFuncError, listing
from ...variant import Variant
from ...variants import IA3FF
from . import names
from .config import allowed
from .method import Method
from .methods import METHODS

ABSENT = (
    "PEFT does not have it. If its update is low-rank, lf.as_lora(adapter, params) makes a LoRA of "
    "it: save that"
)


def method_of(variant: Variant) -> Method:
    """The method of a variant. Raises LoraFuncError if PEFT does not have it."""
    own = [method for method in METHODS if method.kind is type(variant)]
    fitting = next((method for method in own if method.accepts(variant)), None)
    if fitting is not None:
        return fitting
    why = own[0].refusal if own else ABSENT
    raise LoraFuncError(f"{variant} cannot be saved for PEFT: {why}")


def check_together(methods: Mapping[str, Method]) -> None:
    """Raises LoraFuncError for layers whose methods no single config holds."""
    first = next(iter(methods.values()))
    for path, method in methods.items():
        same = method.peft_type == first.peft_type and method.when == first.when
        if not same:
            raise LoraFuncError(
                f"a folder of PEFT's holds one method, and {path!r} has {described(method)} where "
                f"others have {described(first)}. Adapt and save them apart"
            )


def described(method: Method) -> str:
    """PEFT's name of a method."""
    given = "".join(f", {name}={allowed(value)[0]}" for name, value in method.when.items())
    return f"{method.peft_type} ({method.kind.__name__}{given})"


def fields_of(
    variants: Mapping[str, Variant],
    methods: Mapping[str, Method],
    leaves: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Any]:
    """The fields of the method, with exceptions for layers that differ.

    Raises LoraFuncError for a difference that PEFT's config cannot hold.
    """
    check_together(methods)
    method = next(iter(methods.values()))
    fields: dict[str, Any] = {name: allowed(value)[0] for name, value in method.when.items()}
    fields["peft_type"] = method.peft_type
    values: dict[str, dict[str, Any]] = {}
    for path, variant in variants.items():
        own = methods[path]
        given = {theirs: getattr(variant, ours) for ours, theirs in own.fields.items()}
        for name, value in {**given, **own.write(variant, dict(leaves[path]))}.items():
            values.setdefault(name, {})[path] = plain(value)
    for name, of_layers in values.items():
        fields[name] = usual = Counter(of_layers.values()).most_common(1)[0][0]
        differing = [path for path, value in of_layers.items() if value != usual]
        if differing and name not in method.patterns:
            raise LoraFuncError(
                f"PEFT's config of {method.peft_type} has one {name} for all layers, and "
                f"{listing(differing)} differ from {usual!r}. Adapt and save them apart"
            )
        if name in method.patterns:
            fields[method.patterns[name]] = exceptions(name, of_layers, usual, method.anchored)
    return fields


def plain(value: Any) -> Any:
    """A number as PEFT writes it: without a decimal point, if it is whole."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def exceptions(name: str, values: Mapping[str, Any], usual: Any, anchored: bool) -> dict[str, Any]:
    """Path -> value, for the layers that differ and those whose paths end like theirs.

    The longest come first, because PEFT takes the first that matches.
    """
    differing = [path for path, value in values.items() if value != usual]
    named = [path for path in values if names.ends(path, differing)]
    found = {path: values[path] for path in sorted(named, key=len, reverse=True)}
    for path, value in values.items():
        if names.exception(found, path, anchored, usual) != value:
            raise LoraFuncError(
                f"PEFT's exceptions for {name} cannot tell {path!r} from layers whose paths are "
                "alike. Adapt and save them apart"
            )
    return found


def inputs_and_outputs(variants: Mapping[str, Variant], targets: list[str]) -> dict[str, Any]:
    """The targets of IA3, and those of them whose input it scales: by short names, or by paths.

    Raises LoraFuncError if PEFT, which goes by the ends of paths, also in the middle of a name,
    would take one for the other.
    """
    inner = [path for path, variant in variants.items() if isinstance(variant, IA3FF)]
    for named in (targets, sorted(variants)):
        chosen = [name for name in named if any(names.ends(path, [name]) for path in inner)]
        config = {"target_modules": named, "feedforward_modules": chosen}
        if all(names.feeds_forward(config, path) == (path in inner) for path in variants):
            return config
    raise LoraFuncError(
        "PEFT tells IA3FF from IA3 by the ends of paths, and paths of the two end alike. Adapt and "
        "save them apart"
    )


def targets_in(paths: Collection[str], known: Collection[str] | None) -> list[str]:
    """How the config names the paths among those of the model; None if the model is not known.

    Raises LoraFuncError if PEFT would take more.
    """
    if "" in paths:
        raise LoraFuncError("the adapted layer is the model itself, which PEFT cannot adapt")
    if known is None:
        return sorted(paths)
    found = names.shortest(paths, known)
    if extra := [path for path in known if names.ends(path, found) and path not in paths]:
        raise LoraFuncError(
            f"PEFT names layers by the ends of their paths, and would adapt {listing(extra)} too"
        )
    return found
