"""AntiPaSTO: a gain for each of the top singular directions of the weight.
Clark 2026, arXiv 2601.07473, for the family; the gain form is lora-lite's.

    z = (base_out - b) U,    out = base_out + (z * ELU(c g)) Uᵀ    ( = S_r scaled by 1 + ELU(c g) )

U [d_out, r] holds r left singular vectors of W. ELU keeps the gain 1 + ELU(c g) positive, and 1 at
g = 0, where the output is the base output to the bit. The bias is not scaled. `coeff` may change at
inference: `adapter.replace(coeff=-1.0)` steers the other way. With calibration, the r directions
are those that the data excites most, by `pool` of |uᵢᵀ (y - b)| = Sᵢ |vᵢ x|; without, those of the
largest singular values. The signs of singular vectors cancel here, so a file may leave U out
(`lf.save(.., frozen="rebuild")`) and keep only which directions these are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..checks import check_choice, check_fits
from ..linalg import top_svd
from ..statistics import Projections
from ..variant import Params
from ._directions import Gains, strongest


@dataclass(frozen=True, kw_only=True)
class AntiPaSTO(Gains):
    """Gains of singular directions, Clark 2026 (arXiv 2601.07473).

    Trainable: g [r].
    """

    card = Card(
        title="Gains of singular directions",
        authors="Clark 2026",
        source="2601.07473",
        formula="base_out + (z ELU(c g)) Uᵀ, z = (base_out - b) U",
        trainable={"g": "r"},
        reads="init",
        data="optional",
        lr=1e-1,
        width=8,
        beside_peft="not in PEFT; lora-lite rewrites the weight",
    )

    pool: str = "rms"
    """How calibration averages over tokens to choose directions: "rms" or "mean_abs". Unused
    without data."""

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "pool", ("rms", "mean_abs"))

    @property
    def statistic(self):
        return Projections(pool=self.pool)

    def init(self, weight, generator, stats=None):
        check_fits(self, weight.shape)
        index = strongest(stats, self.r)
        g = torch.zeros(self.r, dtype=torch.float32)
        return Params({"g": g}, frozen={"index": index, **self.rebuild(weight, {"index": index})})

    def rebuild(self, weight, leaves):
        U, _, _ = top_svd(weight.dense(), min(weight.shape))
        return {"U": U[:, leaves["index"].to(U.device)]}
