"""Adapters of the LoRA family as pure functions `(x, base_out, weight, params) -> out`.

The public names are those in `__all__` here and, for your own variants, in `__all__` of
`lora_func.linalg`, `lora_func.checks`, `lora_func.statistics` and `lora_func.testing`. Everything
else may change without notice.
"""

from . import variants as _variants
from .allocation import RankAllocator
from .arithmetic import as_lora, combine, singular_values
from .binding import bind
from .capturing import capture
from .card import Card, Peft
from .chain import Chain
from .engine.adapt import adapt
from .engine.adapter import Adapter
from .engine.collect import collect
from .engine.targets import Targets
from .errors import LoraFuncError
from .files.load import load
from .files.save import save
from .grad import value_and_grad
from .merging import merge
from .population import expand, select, stack, unstack
from .probing import Probe, probe
from .reaching import Reach, reach
from .statistics import (
    InputMoments,
    Moments,
    OutputGradients,
    OutputMeans,
    OutputMoments,
    Projections,
)
from .variant import Params, Statistic, Variant, Weight
from .variants import *  # noqa: F403  (the catalogue: one line there makes a variant public)
from .variants import VARIANTS
from .version import __version__

__all__ = [  # noqa: PLE0604
    "VARIANTS",
    "Adapter",
    "Card",
    "Chain",
    "InputMoments",
    "LoraFuncError",
    "Moments",
    "OutputGradients",
    "OutputMeans",
    "OutputMoments",
    "Params",
    "Peft",
    "Probe",
    "Projections",
    "RankAllocator",
    "Reach",
    "Statistic",
    "Targets",
    "Variant",
    "Weight",
    "__version__",
    "adapt",
    "as_lora",
    "bind",
    "capture",
    "collect",
    "combine",
    "expand",
    "load",
    "merge",
    "probe",
    "reach",
    "save",
    "select",
    "singular_values",
    "stack",
    "unstack",
    "value_and_grad",
    *_variants.__all__,
]
