"""`adapt`: from variants and a model to an `Adapter` and its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import LoraFuncError, listing, near_misses
from ..libraries import accelerate
from ..variant import ELSEWHERE, Variant
from ..weights.parameter import ParameterWeight
from . import experts
from .adapter import Adapter
from .collect import collect
from .keys import by_path
from .layer import overrides
from .leaves import check_stats, draw, kinds
from .refused import check_base
from .rules import assign
from .sites import Base, Found
from .targets import Targets

ARGUMENTS = ("targets", "generator", "calibration", "stats", "dtype", "dropout")


@torch.inference_mode(False)  # tensors made in inference mode could never be trained
def adapt(
    model: nn.Module,
    rules: Variant | Mapping[str, Variant],
    *,
    targets: Targets = Targets(),
    generator: torch.Generator | None = None,
    calibration: Iterable[Any] | None = None,
    stats: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    **unknown: NoReturn,  # for an error that names the right argument; type checkers refuse all
) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter for `model`, and fresh parameters for it. The model is not modified.

    Args:
        model: any module with linear layers.
        rules: one Variant for all targets, or a mapping pattern -> Variant. The first regex that
            matches a path (search) names its variant; targets that no pattern matches are left
            alone.
        targets: which layers.
        generator: the only source of randomness; None is torch's default generator.
        calibration: batches for variants that look at data, each in the form in which the model is
            called. One pass over them serves all variants (see `collect`). A layer for which a
            variant then returns no parameters gets no adapter.
        stats: path -> what `collect` found for the layer, instead of calibration.
        dtype: of the trainable parameters. Frozen constants stay in float32 (float64 if the
            weight is).
        dropout: the probability of each entry of a layer's input to be dropped from what the
            variant sees, in train mode. The base layer sees all. It draws from torch's own
            generator, like nn.Dropout.

    Returns:
        `(adapter, params)`. `adapter(model, params, batch)` is the adapted forward. `params` is
        the flat dict `"<path>.lora_<name>" -> tensor`, each on the device of its layer, without
        requires_grad.

    Raises:
        LoraFuncError: a model that is wrapped, scripted or adapted already; no target, or a
            pattern that names none; a layer whose weight cannot be read, or that computes
            something else than x Wᵀ + b; hyperparameters that a layer does not allow; a variant
            that needs calibration and has none; data for variants that look at none; stats of
            another statistic; dropout for what it cannot act on; an argument that adapt does not
            have.

    Warns if nothing is named and most of the model lies in fused experts, which have no layers.
    """
    check_model(model)
    check_arguments(rules, targets, unknown)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LoraFuncError(
            f"dtype must be a floating torch dtype such as torch.float32, not {dtype!r}"
        )
    found = assign(rules, targets, model)
    check_dropout(dropout, found)
    if isinstance(rules, Variant) and not (targets.names or targets.parameters):
        experts.warn_of_reach(model, found)
    accelerate.check_offload(model, [site.path for site in found])
    if calibration is not None:
        if stats is not None:
            raise LoraFuncError(
                "calibration= and stats= were both given: pass batches, or what collect found"
            )
        stats = calibrate(model, found, calibration)
    base: dict[str, Base] = {}

    def note(site: Found, snapshot: Any) -> None:
        base[site.path] = Base.of(site.weight, snapshot)

    check_stats(found, stats)
    leaves = draw(found, generator, stats, note)
    given = by_path({**leaves.trainable, **leaves.frozen})
    kept = [site for site in found if site.path in given or site.variant in leaves.sharing]
    variants = {site.path: site.variant for site in kept}
    if not variants:
        paths = listing(site.path for site in found)
        raise LoraFuncError(f"the variants returned no parameters for any of the layers {paths}")
    params = {key: leaf.to(dtype) for key, leaf in leaves.trainable.items()}
    shapes = {key: leaf.shape for key, leaf in params.items()}
    base = {path: base[path] for path in variants}
    adapter = Adapter(variants, shapes, leaves.frozen, base, dtype, dropout=float(dropout))
    adapter.remember(model)
    adapter.trust(model)
    return adapter, params


def check_dropout(dropout: Any, found: Sequence[Found]) -> None:
    """Raises LoraFuncError for no probability, and for a target on which dropout has no effect."""
    number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
    if not number or not 0 <= dropout < 1:
        raise LoraFuncError(f"dropout={dropout!r}; expected a probability below 1, such as 0.05")
    for site in found if dropout else ():
        if isinstance(site.weight, ParameterWeight):
            why = "a parameter, which has no input of its own"
        elif not any(overrides(part, "apply") for part in site.variant.parts()):
            why = (
                f"adapted by {type(site.variant).__name__}, which acts on what the base layer sees"
            )
        else:
            continue
        raise LoraFuncError(
            f"dropout={dropout} cannot act on {site.path!r}: it is {why}. Leave dropout= out"
        )


def check_arguments(rules: Any, targets: Any, unknown: Mapping[str, Any]) -> None:
    """Raises LoraFuncError for what other libraries call the arguments of adapt."""
    for name in unknown:
        known = [item.name for item in dataclasses.fields(rules)] if is_dataclass(rules) else []
        if name in known or ELSEWHERE.get(name) in known:
            field, kind = ELSEWHERE.get(name, name), type(rules).__name__
            raise LoraFuncError(f"adapt has no argument {name!r}: {field} is a field of {kind}")
        hint = near_misses(name, ARGUMENTS)
        if name in ELSEWHERE:
            hint = f" It is called {ELSEWHERE[name]} here."
        raise LoraFuncError(
            f"adapt has no argument {name!r}; it takes (model, rules) and {listing(ARGUMENTS)}."
            f"{hint}"
        )
    if not isinstance(targets, Targets):
        names = (targets,) if isinstance(targets, str) else targets
        named = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
        hint = f": write lf.Targets(names={tuple(names)!r})" if named else ""
        raise LoraFuncError(f"targets must be a lf.Targets, not {targets!r}{hint}")


def check_model(model: Any) -> None:
    """Raises LoraFuncError for what cannot be adapted."""
    if not isinstance(model, nn.Module):
        raise LoraFuncError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    check_base(model)


def calibrate(
    model: nn.Module, found: Sequence[Found], batches: Iterable[Any]
) -> Mapping[str, Any]:
    """path -> stats, for the layers whose variant has a statistic.

    Raises LoraFuncError if none has.
    """
    # What a parameter sees, no layer tells.
    layers = [site for site in found if not isinstance(site.weight, ParameterWeight)]
    wanted = {site.path: site.variant.statistic for site in layers}
    wanted = {path: statistic for path, statistic in wanted.items() if statistic is not None}
    if not wanted:
        raise LoraFuncError(
            f"calibration= was given, but {kinds(found)} looks at no data: leave it out"
        )
    return collect(model, wanted, batches, wanted)
