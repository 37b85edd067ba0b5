"""Adapters of the LoRA family as pure functions `(x, base_out, weight, params) -> out` on torch.func."""

from .adapt import Adapter, adapt, bind
from .errors import LoraFuncError
from .grad import value_and_grad
from .io import load, save
from .merge import merge
from .population import expand, select, stack, unstack
from .probe import Probe, probe
from .targets import Targets
from .variant import Params, Variant, Weight
from .variants import HRA, IA3, IA3FF, VARIANTS, DeLoRA, DoRA, LoRA, PiSSA
from .version import __version__

__all__ = [
    "HRA",
    "IA3",
    "IA3FF",
    "VARIANTS",
    "Adapter",
    "DeLoRA",
    "DoRA",
    "LoRA",
    "LoraFuncError",
    "Params",
    "PiSSA",
    "Probe",
    "Targets",
    "Variant",
    "Weight",
    "__version__",
    "adapt",
    "bind",
    "expand",
    "load",
    "merge",
    "probe",
    "save",
    "select",
    "stack",
    "unstack",
    "value_and_grad",
]
