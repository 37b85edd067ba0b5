"""IA3: learned rescaling of a layer's output. Liu et al. 2022, arXiv 2205.05638.

    out = base_out + base_out ∘ d          ( = base_out ∘ g with the paper's gate g = 1 + d )

d [d_out] is zero at init, so the output is the base output to the bit. The gate is stored as its
deviation from 1: bfloat16 would round 1 + 2e-3 back to 1, and weight decay then pulls to the base
model instead of switching the layer off. The bias is scaled too, as in PEFT. Made for k_proj and
v_proj; IA3FF is for the input of down_proj. Nothing of the weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..linalg import at_least_float32, over_rows
from ..variant import Params, Variant
from ._gate import gated


@dataclass(frozen=True, kw_only=True)
class IA3(Variant):
    """Learned rescaling of the output, Liu et al. 2022 (arXiv 2205.05638).

    Trainable: d [d_out], the gate minus 1.
    """

    card = Card(
        title="Learned rescaling of the output",
        authors="Liu et al. 2022",
        source="2205.05638",
        formula="base_out (1 + d)",
        trainable={"d": "d_out"},
        reads="nothing",
        lr=3e-2,
        layers=(r"k_proj$", r"v_proj$"),
        peft=Peft("IA3Config", {"feedforward_modules": []}, rank=None),
        beside_peft="the same function; the gate is stored as its deviation from 1",
    )
    broadcasts = rounds_last = True

    def init(self, weight, generator, stats=None):
        return Params({"d": torch.zeros(weight.shape[0], dtype=torch.float32)})

    def prepare(self, weight, params, dtype):
        return {"d": params["d"].to(dtype)}

    def apply(self, x, base_out, weight, params):
        return gated(base_out, over_rows(params["d"]).to(base_out.dtype))

    def merged(self, weight, params):
        # (1 + d) W, (1 + d) b
        g = 1 + params["d"]
        W = g[:, None] * at_least_float32(weight.dense())
        return W, None if weight.bias is None else g * weight.bias
