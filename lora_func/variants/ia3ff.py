"""IA3-FF: learned rescaling of a layer's input. Liu et al. 2022, arXiv 2205.05638.

    x' = x + x ∘ d,   out = base layer of x'     ( = base layer of x ∘ g, with the gate g = 1 + d )

d [d_in] is zero at init, so x' is x to the bit. IA3 says why the deviation is stored. The bias is
not scaled. Made for down_proj, whose input is the paper's gated activation. Nothing of the weight
is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import TARGETS, Card, Peft
from ..linalg import at_least_float32, over_rows
from ..variant import Params, Variant
from ._gate import gated


@dataclass(frozen=True, kw_only=True)
class IA3FF(Variant):
    """Learned rescaling of the input, Liu et al. 2022 (arXiv 2205.05638).

    Trainable: d [d_in], the gate minus 1.
    """

    card = Card(
        title="Learned rescaling of the input",
        authors="Liu et al. 2022",
        source="2205.05638",
        formula="base layer of x (1 + d)",
        trainable={"d": "d_in"},
        reads="nothing",
        lr=3e-2,
        layers=(r"down_proj$",),
        peft=Peft("IA3Config", {"feedforward_modules": TARGETS}, rank=None),
        beside_peft="the same function; the gate is stored as its deviation from 1",
    )
    broadcasts = rounds_last = True

    def init(self, weight, generator, stats=None):
        return Params({"d": torch.zeros(weight.shape[1], dtype=torch.float32)})

    def prepare(self, weight, params, dtype):
        return {"d": params["d"].to(dtype)}

    def transform_input(self, x, params):
        return gated(x, over_rows(params["d"]).to(x.dtype))

    def merged(self, weight, params):
        # W (1 + d)
        return at_least_float32(weight.dense()) * (1 + params["d"]), weight.bias
