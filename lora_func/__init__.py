"""Adapters of the LoRA family as pure functions `(x, base_out, weight, params) -> out` on torch.func."""

from .adapt import Adapter, adapt, bind
from .calibrate import InputMoments, Moments, OutputGradients, OutputMeans, OutputMoments, Projections, collect
from .errors import LoraFuncError
from .grad import value_and_grad
from .io import load, save
from .merge import merge
from .population import expand, select, stack, unstack
from .probe import Probe, probe
from .targets import Targets
from .variant import Params, Statistic, Variant, Weight
from .variants import (
    EVA,
    HRA,
    IA3,
    IA3FF,
    SSVD,
    VARIANTS,
    AntiPaSTO,
    AntiPaSTOAblate,
    AntiPaSTOArrow,
    AntiPaSTOCorDA,
    AntiPaSTORotation,
    CorDA,
    DeLoRA,
    DoRA,
    LoRA,
    LoRAGA,
    MiLoRA,
    OLoRA,
    PiSSA,
    SSteer,
)
from .version import __version__

__all__ = [
    "EVA",
    "HRA",
    "IA3",
    "IA3FF",
    "SSVD",
    "VARIANTS",
    "Adapter",
    "AntiPaSTO",
    "AntiPaSTOAblate",
    "AntiPaSTOArrow",
    "AntiPaSTOCorDA",
    "AntiPaSTORotation",
    "CorDA",
    "DeLoRA",
    "DoRA",
    "InputMoments",
    "LoRA",
    "LoRAGA",
    "LoraFuncError",
    "MiLoRA",
    "Moments",
    "OLoRA",
    "OutputGradients",
    "OutputMeans",
    "OutputMoments",
    "Params",
    "PiSSA",
    "Probe",
    "Projections",
    "SSteer",
    "Statistic",
    "Targets",
    "Variant",
    "Weight",
    "__version__",
    "adapt",
    "bind",
    "collect",
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
