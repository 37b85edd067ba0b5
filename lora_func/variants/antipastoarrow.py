"""AntiPaSTO-arrow: a dense block on the top singular directions, and gains on the rest.
After Clark 2026, arXiv 2601.07473; this form is lora-lite's.

    z = (base_out - b) U,    out = base_out + [ c z_1 Mᵀ , z_2 * ELU(c g) ] Uᵀ

z_1 are the coordinates along the first `block` directions, z_2 the others. M[i, j] sends direction
j to direction i: for x = v_j, the output moves by c M[i, j] S_j along u_i. M = 0 and g = 0 give the
base output to the bit. The block is linear and unbounded, and acts on coordinates scaled by S, so
M needs a lower learning rate than g. `coeff` may change at inference. With calibration the
directions are chosen as in AntiPaSTO, and kept in the order of their singular values. The weight
is read once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..card import Card
from ..checks import check_choice, check_rank
from ..errors import LoraFuncError
from ..statistics import Projections
from ..variant import Params
from ._directions import Gains, strongest_svd


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOArrow(Gains):
    """A dense block and gains, Clark 2026 (arXiv 2601.07473).

    Trainable: M [block, block], g [r - block].
    """

    card = Card(
        title="A dense block and gains",
        authors="Clark 2026",
        source="2601.07473",
        formula="base_out + [c z_1 Mᵀ, z_2 ELU(c g)] Uᵀ, z = (base_out - b) U",
        trainable={"M": "block, block", "g": "r - block"},
        reads="init",
        data="optional",
        lr=0.03,
        width=8,
        beside_peft="not in PEFT; lora-lite rewrites the weight",
    )

    block: int = 8
    """Number of directions in the dense block, from 1 to r - 1."""
    pool: str = "rms"
    """How calibration averages over tokens to choose directions: "rms" or "mean_abs". Unused
    without data."""

    def __post_init__(self):
        super().__post_init__()
        check_rank(self, "block")
        check_choice(self, "pool", ("rms", "mean_abs"))
        if self.block >= self.r:
            raise LoraFuncError(
                f"AntiPaSTOArrow(r={self.r}, block={self.block}): block must be below r"
            )

    @property
    def statistic(self):
        return Projections(pool=self.pool)

    def init(self, weight, generator, stats=None):
        U, _, _ = strongest_svd(self, weight, stats)
        M = torch.zeros(self.block, self.block, dtype=torch.float32)
        g = torch.zeros(self.r - self.block, dtype=torch.float32)
        return Params({"M": M, "g": g}, frozen={"U": U})

    def core(self, params):
        return {**super().core(params), "block": self.coeff * params["M"]}

    def act(self, z, p):
        routed = F.linear(z[..., : self.block], p["block"].to(z.dtype))
        return torch.cat([routed, super().act(z[..., self.block :], p)], dim=-1)
