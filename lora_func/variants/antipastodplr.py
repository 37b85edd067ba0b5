"""AntiPaSTO-DPLR: gains of singular directions, plus a low-rank core that mixes them.
After Clark 2026, arXiv 2601.07473; this form is lora-lite's.

    p = x V_rᵀ,    out = base_out + [ p * S * ELU(c g) + c (p Aᵀ) Bᵀ ] U_rᵀ

U_r S V_r are r singular triplets of the weight, which is read once, at init. The core between V_r
and U_r is diagonal plus low rank: S (1 + ELU(c g)) scales each direction as in AntiPaSTO, and
c B A, with A [k, r] and B [r, k], mixes all of them. It is added and not multiplied with S, so a
step of B A moves the weight as far along weak directions as along strong ones; AntiPaSTO-arrow's
block acts on coordinates scaled by S. A is Kaiming-uniform; g and B are zero, so the output at init
is the base output to the bit. `coeff` may change at inference. With calibration the directions are
chosen as in AntiPaSTO. The vectors belong in the file: B A depends on their signs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..card import Card
from ..checks import check_choice, check_rank
from ..errors import LoraFuncError
from ..linalg import kaiming
from ..statistics import Projections
from ..variant import Params
from ._directions import Gain, Turned, strongest_svd


@dataclass(frozen=True, kw_only=True)
class AntiPaSTODPLR(Gain, Turned):
    """Gains and a low-rank core, Clark 2026 (arXiv 2601.07473).

    Trainable: g [r], A [k, r], B [r, k].
    """

    card = Card(
        title="Gains and a low-rank core",
        authors="Clark 2026",
        source="2601.07473",
        formula="base_out + [p S ELU(c g) + c (p Aᵀ) Bᵀ] Uᵀ, p = x Vᵀ",
        trainable={"g": "r", "A": "k, r", "B": "r, k"},
        reads="init",
        data="optional",
        lr=0.03,
        width=8,
        beside_peft="not in PEFT; lora-lite rewrites the weight",
    )

    k: int = 8
    """Rank of the core B A, from 1 to r."""
    pool: str = "rms"
    """How calibration averages over tokens to choose directions: "rms" or "mean_abs". Unused
    without data."""

    def __post_init__(self):
        super().__post_init__()
        check_rank(self, "k")
        check_choice(self, "pool", ("rms", "mean_abs"))
        if self.k > self.r:
            raise LoraFuncError(f"AntiPaSTODPLR(r={self.r}, k={self.k}): k must be at most r")

    @property
    def statistic(self):
        return Projections(pool=self.pool)

    def init(self, weight, generator, stats=None):
        U, S, V = strongest_svd(self, weight, stats)
        g = torch.zeros(self.r, dtype=torch.float32)
        A, B = kaiming(self.k, self.r, generator), torch.zeros(self.r, self.k, dtype=torch.float32)
        return Params({"g": g, "A": A, "B": B}, frozen={"U": U, "S": S, "V": V})

    def core(self, params):
        shift = params["S"] * self.gain(params["g"])  # of the singular values
        return {"shift": shift, "A": params["A"], "B": self.coeff * params["B"]}

    def act(self, p, core):
        shift, A, B = (core[name].to(p.dtype) for name in ("shift", "A", "B"))
        return p * shift + F.linear(F.linear(p, A), B)
