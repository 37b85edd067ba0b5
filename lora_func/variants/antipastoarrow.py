"""AntiPaSTO-arrow: a dense block on the top singular directions, and gains on the rest. After Clark 2026, arXiv 2601.07473;
this form is lora-lite's.

    z = (base_out - b) U,    out = base_out + [ c z_1 Mᵀ , z_2 * ELU(c g) ] Uᵀ

z_1 are the coordinates along the first `block` directions, z_2 along the others. M[i, j] sends direction j to direction i
with exactly that weight: for x = v_j, the output moves by c M[i, j] S_j along u_i. M = 0 and g = 0 give the base output to
the bit. The block is linear and unbounded, and it acts on coordinates scaled by S, so M wants a lower learning rate than g.
`coeff` may be changed at inference. With calibration the directions are chosen as in AntiPaSTO, and kept in the order of their
singular values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..calibrate import Projections
from ..errors import LoraFuncError
from ..numerics import add_along, coordinates, cored, gain, strongest_svd
from ..variant import Params, Variant, check_choice, check_number, check_rank


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOArrow(Variant):
    """A dense block and gains, Clark 2026 (arXiv 2601.07473). Trainable: M [block, block], g [r - block]."""

    r: int = 256  # singular directions, from 2 to min(d_in, d_out)
    block: int = 8  # of them in the dense block, from 1 to r - 1
    coeff: float = 1.0  # factor of M and g, any number; may change at inference
    suppress_only: bool = False  # clamp g at 0 from above
    pool: str = "rms"  # how tokens are pooled where the directions are chosen by data: "rms" or "mean_abs"

    def __post_init__(self):
        check_rank(self)
        check_rank(self, "block")
        check_number(self, "coeff")
        check_choice(self, "suppress_only", (False, True))
        check_choice(self, "pool", ("rms", "mean_abs"))
        if self.block >= self.r:
            raise LoraFuncError(f"AntiPaSTOArrow(r={self.r}, block={self.block}): block must be below r")

    @property
    def statistic(self):
        return Projections(pool=self.pool)

    def init(self, weight, generator, stats=None):
        U, _, _ = strongest_svd(weight, self.r, "AntiPaSTOArrow", stats)
        trainable = {"M": torch.zeros(self.block, self.block), "g": torch.zeros(self.r - self.block)}
        return Params(trainable, frozen={"U": U})

    def apply(self, x, base_out, weight, params):
        z = coordinates(base_out, weight.bias, params["U"])  # [.., r]
        routed = F.linear(z[..., : self.block], (self.coeff * params["M"]).to(z.dtype))
        scaled = z[..., self.block :] * gain(params["g"], self.coeff, self.suppress_only).to(z.dtype)
        return add_along(base_out, torch.cat([routed, scaled], dim=-1), params["U"])

    def merged(self, weight, params):
        # (I + U blockdiag(c M, diag(ELU(c g))) Uᵀ) W
        tail = gain(params["g"], self.coeff, self.suppress_only).diag()
        return cored(weight, params["U"], torch.block_diag(self.coeff * params["M"], tail)), weight.bias
