"""Fused experts: tensors that hold the matrices of many experts, which no linear layer applies."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from .sites import Found


def fused_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Path of a parameter -> a stack of matrices `[experts, .., ..]`."""
    return {
        f"{path}.{name}".removeprefix("."): parameter
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
    }


def named(pattern: str, model: nn.Module) -> str:
    """For an error: the fused tensor that a pattern matches, or ""."""
    for path, stack in fused_tensors(model).items():
        if re.search(pattern, path):
            return (
                f" {path!r} fuses {stack.shape[0]} matrices in one tensor of shape "
                f"{tuple(stack.shape)}: name it as a parameter, "
                f"Targets(parameters=({pattern!r},))"
            )
    return ""


def warn_of_reach(model: nn.Module, found: Sequence[Found]) -> None:
    """Warns if most of a model lies in fused experts, of how little of it the targets are."""
    fused = fused_tensors(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(stack.numel() for stack in fused.values()) / max(total, 1)
    if share > 0.5:
        reached = sum(site.weight.shape[0] * site.weight.shape[1] for site in found) / total
        warnings.warn(
            f"the {len(found)} adapted layers hold {reached:.1%} of the parameters of this "
            f"{type(model).__name__}; {share:.1%} lie in fused experts such as "
            f"{next(iter(fused))!r}, which no linear layer applies. Name them as parameters, "
            "targets=lf.Targets(parameters=..), or name the layers that you mean, names=..",
            stacklevel=4,
        )
