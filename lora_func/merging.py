"""`merge`: an adapter folded into weights, for tools that know only plain layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .engine.adapter import Adapter, check_order
from .engine.holder import entries_of
from .engine.tensor import dense
from .errors import LoraFuncError, listing
from .libraries.functorch import in_transform
from .libraries.torch_hooks import computes_weight
from .precision import at_least_float32, autocast_off
from .variant import Weight


def merge(
    adapter: Adapter,
    model: nn.Module,
    params: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The weights of the adapted layers with the adapter folded in, as a new dict.

    Args:
        adapter: as `adapt` or `load` returned it.
        model: the model that the adapter was made for, or one with the same layers.
        params: flat key -> tensor, for one adapter.
        dtype: of the result; None is that of each layer's weight (dequantized, if it is packed).
            The computation runs in float32 or wider.

    Returns:
        `"<path>.weight" -> W_eff` in the layout of the layer, and `"<path>.bias" -> b_eff` if it
        changed; `"<path>" -> W_eff` of a parameter. It is for
        `model.load_state_dict(merged, strict=False)` or
        `torch.func.functional_call(model, merged, ...)`. Differentiable in `params`. The merged
        weight of a packed layer is dense, made from the dequantized one: it is for a float model.

    Raises:
        LoraFuncError: bad `params` or model; parameters that are not finite, or a merged weight
            that overflows; a variant without a closed form, or one that adds a bias to a layer that
            has none; a weight that another module uses too, or that its layer computes from other
            tensors.
    """
    check_order("merge(adapter, model, params)", adapter=adapter, model=model)
    adapter.check(params, examples=False)
    if broken := not_finite(params):
        raise LoraFuncError(
            f"params: {listing(broken)} has NaN or infinite entries. Merge parameters from before "
            "the training diverged"
        )
    users = defaultdict(set)  # id of a parameter -> the paths of the modules that hold it
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)].add(path)
    merged = {}
    weights: dict[str, Any] = adapter.weights(model)
    for path, stored in weights.items():
        if (tensor := adapter.base[path].tensor) is not None:
            site = adapter.site(path)
            entries = entries_of(site, {n: params[key] for n, (key, _) in site.leaves.items()})
            merged[tensor] = dense(site, stored, entries, dtype).clone()
            continue
        layer = stored.layer
        if computes_weight(layer):
            raise LoraFuncError(
                f"{path!r} computes its weight from other tensors, as weight_norm does, so it "
                "cannot hold a merged one. First make it a plain layer, which the adapter also "
                "fits: torch.nn.utils.parametrize.remove_parametrizations, or for the older hooks "
                "remove_weight_norm, remove_spectral_norm or prune.remove"
            )
        if others := users[id(layer._parameters.get("weight"))] - {path}:
            raise LoraFuncError(
                f"{path!r} shares its weight with {listing(sorted(others))}, which merging would "
                "change too"
            )
        bias = None if stored.bias is None else at_least_float32(stored.bias.detach())
        matrix = stored.dense().detach()
        weight = Weight(at_least_float32(matrix), bias)
        with autocast_off(matrix.device):
            W, b = adapter.variants[path].merged(weight, adapter.params_of(path, params))
        merged[f"{path}.weight"] = stored.as_stored(W).to(dtype or matrix.dtype, copy=True)
        if b is not None and bias is None:
            raise LoraFuncError(
                f"{path!r} has no bias, and {adapter.variants[path]} adds one, which it cannot "
                "hold. First give the layer a bias of zeros: the adapter also fits it then"
            )
        if b is not None and b is not bias:
            merged[f"{path}.bias"] = b.to(dtype or matrix.dtype, copy=True)
    if broken := not_finite(merged):
        raise LoraFuncError(
            f"{listing(broken)} overflows in {merged[broken[0]].dtype}. Merge into a wider dtype, "
            "or parameters from before the training diverged"
        )
    return merged


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys of tensors with NaN or infinite entries. Empty in a transform, which hides them."""
    if in_transform() or torch.compiler.is_compiling():
        return []
    return [key for key, t in tensors.items() if not t.is_meta and not t.isfinite().all()]
