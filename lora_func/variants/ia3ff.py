"""IA3-FF: learned rescaling of a layer's input, the feed-forward half of IA3. Liu et al. 2022, arXiv 2205.05638.

    x' = x + x ∘ d,   out = base layer of x'          ( = base layer of x ∘ g with the paper's gate g = 1 + d )

d [d_in] is zero at init, so x' is x to the bit. Why the deviation is stored, see IA3. The bias is not scaled. Made for
down_proj, whose input is the paper's gated activation. Reads nothing of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..numerics import at_least_float32
from ..variant import Params, Variant


@dataclass(frozen=True, kw_only=True)
class IA3FF(Variant):
    """Learned rescaling of the input, Liu et al. 2022 (arXiv 2205.05638). Trainable: d [d_in], the gate minus 1."""

    def init(self, weight, generator, stats=None):
        return Params({"d": torch.zeros(weight.shape[1])})

    def transform_input(self, x, params):
        return torch.addcmul(x, x, params["d"].to(x.dtype))

    def merged(self, weight, params):
        # W (1 + d)
        return at_least_float32(weight.dense()) * (1 + params["d"]), weight.bias
