"""LoRA-GA: LoRA whose first step follows the full gradient. Wang et al. 2024, arXiv 2407.05000.

    out = base_out + s x (BA - B0A0)ᵀ,   telescoped as in PiSSA

    G = dL/dW,   U S V = svd(G),   A0 = V[:r],   B0 = U[:, r:2r] S[r:2r] d_out^(1/4) / sqrt(gamma),   s = alpha / r

A0 and B0 take different triplets of the gradient, so that the first update of BA spans 2r of its directions. That is PEFT's
"ArB2r" with scale "stable", S within B0 included; the paper's text scales both factors and leaves S out. G is summed up from
inputs and output gradients during calibration, and divided by the number of batches, so that B0 does not grow with it: no
weight needs `requires_grad`, and a quantized one works. The output at init is the base output to the bit. The weight itself
is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..calibrate import OutputGradients
from ..numerics import anchored, anchored_update, anchored_weight, check_fits, needs_data, top_svd
from ..variant import Variant, Weight, check_choice, check_positive, check_rank


@dataclass(frozen=True, kw_only=True)
class MeanGradient(OutputGradients):
    """`OutputGradients`, divided by the number of times that the layer was called."""

    def update(self, state: Any, tokens: Any) -> Any:
        calls, G = (0, None) if state is None else state
        return calls + 1, super().update(G, tokens)

    def finalize(self, states):
        return {path: state[1] / state[0] for path, state in states.items() if state is not None}


@dataclass(frozen=True, kw_only=True)
class LoRAGA(Variant):
    """LoRA with gradient approximation, Wang et al. 2024 (arXiv 2407.05000). Trainable: A [r, d_in], B [d_out, r]."""

    r: int = 8  # rank, from 1 to half of min(d_in, d_out)
    alpha: float = 16.0  # scale of the update before the division by r, above 0
    gamma: float = 16.0  # the larger, the smaller B0; above 0
    svd: str = "exact"  # or "randomized"
    niter: int = 4  # power iterations of the randomized one

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")
        check_positive(self, "gamma")
        check_choice(self, "svd", ("exact", "randomized"))
        check_rank(self, "niter")

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    @property
    def statistic(self):
        return MeanGradient()

    def init(self, weight, generator, stats=None):
        if stats is None:
            raise needs_data(self, "the gradient on a few batches with labels")
        r, (d_out, _) = self.r, weight.shape
        check_fits("LoRAGA, which takes 2r triplets, ", 2 * r, weight.shape)
        U, S, V = top_svd(Weight(stats), 2 * r, "LoRAGA", self.niter if self.svd == "randomized" else None, generator)
        return anchored(V[:r], U[:, r:] * S[r:] * (d_out**0.25 / self.gamma**0.5))

    def like(self, weight, leaves):
        d_out, d_in = weight.shape
        return anchored(torch.empty(self.r, d_in), torch.empty(d_out, self.r))

    def apply(self, x, base_out, weight, params):
        return anchored_update(base_out, x, params, self.scale)

    def merged(self, weight, params):
        return anchored_weight(weight, params, self.scale), weight.bias
