"""`adapt`: from variants and a model to an `Adapter` and its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraFuncError, listing
from ..libraries import accelerate
from ..variant import Variant
from .adapter import Adapter
from .collect import collect
from .keys import by_path
from .layer import AdaptedLayer
from .leaves import draw, kinds
from .sites import Base, Found
from .targets import Targets, assign


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

    Returns:
        `(adapter, params)`. `adapter(model, params, batch)` is the adapted forward. `params` is
        the flat dict `"<path>.lora_<name>" -> tensor`, each on the device of its layer, without
        requires_grad.

    Raises:
        LoraFuncError: no target, or a pattern that names none; a layer whose weight cannot be
            read; hyperparameters that a layer does not allow; a variant that needs calibration and
            has none; data for variants that look at none; stats of another statistic.
    """
    check_model(model)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LoraFuncError(
            f"dtype must be a floating torch dtype such as torch.float32, and not {dtype!r}"
        )
    found = assign(rules, targets, model)
    accelerate.check_offload(model, [site.path for site in found])
    if calibration is not None:
        if stats is not None:
            raise LoraFuncError(
                "calibration= and stats= were both given; stats are what a calibration returned"
            )
        stats = calibrate(model, found, calibration)
    base: dict[str, Base] = {}

    def note(site: Found, snapshot: Any) -> None:
        base[site.path] = Base.of(site.weight, snapshot)

    leaves = draw(found, generator, stats, note)
    given = by_path({**leaves.trainable, **leaves.frozen})
    kept = [site for site in found if site.path in given or site.variant in leaves.sharing]
    variants = {site.path: site.variant for site in kept}
    if not variants:
        paths = listing(site.path for site in found)
        raise LoraFuncError(f"{paths}: the variants gave parameters to none of the layers")
    params = {key: leaf.to(dtype) for key, leaf in leaves.trainable.items()}
    shapes = {key: leaf.shape for key, leaf in params.items()}
    base = {path: base[path] for path in variants}
    adapter = Adapter(variants, shapes, leaves.frozen, base, dtype)
    adapter.remember(model)
    return adapter, params


def check_model(model: Any) -> None:
    """Raises LoraFuncError for what cannot be adapted."""
    if not isinstance(model, nn.Module):
        raise LoraFuncError(f"model must be a torch.nn.Module, and not {type(model).__name__}")
    if any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise LoraFuncError(
            "the model is a bound view, which carries an adapter already. Adapt the base model "
            "with several variants at once (a mapping pattern -> Variant), or merge the first "
            "adapter into its weights (lf.merge)"
        )


def calibrate(
    model: nn.Module, found: Sequence[Found], batches: Iterable[Any]
) -> Mapping[str, Any]:
    """path -> stats, for the layers whose variant has a statistic.

    Raises LoraFuncError if none has.
    """
    wanted = {site.path: site.variant.statistic for site in found}
    wanted = {path: statistic for path, statistic in wanted.items() if statistic is not None}
    if not wanted:
        raise LoraFuncError(
            f"calibration= was given, and {kinds(found)} looks at no data: leave it out"
        )
    return collect(model, wanted, batches, wanted)
