"""AntiPaSTO: a gain for each of the top singular directions of the weight. Clark 2026, arXiv 2601.07473, for the family; the
gain form is lora-lite's.

    z = (base_out - b) U,    out = base_out + (z * ELU(c g)) Uᵀ                     ( = S_r scaled by 1 + ELU(c g) )

U [d_out, r] are r left singular vectors of W. Since Uᵀ W x = S (V x), the gain of the singular values acts on the outputs
alone: neither S, V nor x is needed, and the base keeps its weight. ELU keeps the gain 1 + ELU(c g) positive, and 1 at
g = 0, where the output is the base output to the bit. The bias is not scaled. `coeff` may be changed at inference
(`adapter.replace(coeff=-1.0)`): its negative steers the other way. With calibration, the r directions are those that the
data excites most, by `pool` of |uᵢᵀ (y - b)| = Sᵢ |vᵢ x|; without, those of the largest singular values. No sign of a
singular vector matters here, so a file may leave U out (`lf.save(..., frozen="rebuild")`) and keep which directions these are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..calibrate import Projections
from ..numerics import add_along, check_fits, coordinates, cored, gain, strongest, top_svd
from ..variant import Params, Variant, check_choice, check_number, check_rank


@dataclass(frozen=True, kw_only=True)
class AntiPaSTO(Variant):
    """Gains of singular directions, Clark 2026 (arXiv 2601.07473). Trainable: g [r]."""

    r: int = 256  # singular directions, from 1 to min(d_in, d_out)
    coeff: float = 1.0  # factor of g, any number; may change at inference
    suppress_only: bool = False  # clamp g at 0 from above, so that no gain exceeds 1 for coeff >= 0
    pool: str = "rms"  # how tokens are pooled where the directions are chosen by data: "rms" or "mean_abs"

    def __post_init__(self):
        check_rank(self)
        check_number(self, "coeff")
        check_choice(self, "suppress_only", (False, True))
        check_choice(self, "pool", ("rms", "mean_abs"))

    @property
    def statistic(self):
        return Projections(pool=self.pool)

    def init(self, weight, generator, stats=None):
        check_fits("AntiPaSTO", self.r, weight.shape)
        index = strongest(stats, self.r)
        return Params({"g": torch.zeros(self.r)}, frozen={"index": index, **self.rebuild(weight, {"index": index})})

    def rebuild(self, weight, leaves):
        U, _, _ = top_svd(weight, min(weight.shape), "AntiPaSTO")
        return {"U": U[:, leaves["index"].to(U.device)]}

    def apply(self, x, base_out, weight, params):
        z = coordinates(base_out, weight.bias, params["U"])  # [.., r]
        return add_along(base_out, z * gain(params["g"], self.coeff, self.suppress_only).to(z.dtype), params["U"])

    def merged(self, weight, params):
        # (I + U diag(ELU(c g)) Uᵀ) W
        return cored(weight, params["U"], gain(params["g"], self.coeff, self.suppress_only).diag()), weight.bias
