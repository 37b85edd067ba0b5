"""Models that cannot be a base as they are: wrapped, scripted, or with an adapter already."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from ..errors import LoraFuncError
from ..libraries import fsdp, peft
from .holder import Holder

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
PROXIES = (weakref.ProxyType, weakref.CallableProxyType)


def check_base(model: nn.Module) -> None:
    """Raises LoraFuncError for such a model. The error names the module, its class, the way out."""
    for path, module in model.named_modules():
        if reason := problem(module):
            where = repr(path) if path else "the model"
            raise LoraFuncError(f"{where} is a {type(module).__name__}{reason}")
        for name, child in module._modules.items():
            if type(child) in PROXIES:
                raise LoraFuncError(
                    f"{f'{path}.{name}'.lstrip('.')!r} is a weak proxy of a module, which torch "
                    "takes for a submodule. Keep it in a list, or use weakref.ref"
                )


def problem(module: nn.Module) -> str | None:
    """Why a model with this module in it cannot be a base, after the name of its class."""
    if isinstance(module, Holder):
        return (
            ": the model is a bound view, which carries an adapter already. Adapt the base model "
            "with several variants at once (a mapping pattern -> Variant), or merge the first "
            "adapter into its weights (lf.merge)"
        )
    if isinstance(module, PARALLEL):
        return (
            ", which holds the model in model.module. Adapt that one, and wrap the module that "
            "lf.bind(adapted_forward, model.module, params) returns"
        )
    if fsdp.is_first_version(module):
        return ", whose weights are flat shards. Use fully_shard, or adapt before you wrap"
    if isinstance(module, torch.jit.ScriptModule):
        return (
            ": TorchScript runs code of its own, which adapters cannot reach. Adapt the model "
            "that it was made from"
        )
    if peft.is_adapted(module):
        return (
            " of PEFT, which carries an adapter already. Take the base of its model, "
            "model.unload(), or merge the adapter into it, model.merge_and_unload()"
        )
    return None
