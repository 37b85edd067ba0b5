"""SSVD: rotated right singular vectors and shifted singular values.
Wang, Watanabe & Van hamme 2025, arXiv 2509.02830.

    p = x V_rᵀ,    G = (I - K)(I + K)⁻¹,    out = base_out + [ dS * (G p) + S_r * ((G - I) p) ] U_rᵀ

K [r, r] is skew-symmetric, given by its upper triangle k. G - I = -2 (I + K)⁻¹ K and dS are zero at
init, so the output is the base output to the bit. `approximate` takes the paper's default
G - I = -2K, which is orthogonal up to O(K²) and saves the r x r solve. The output moves within the
span of U_r. The weight is read once, at init. The paper gives r as a share of the spectrum, and no
values for language models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..card import Card
from ..checks import check_choice, check_fits, check_rank
from ..linalg import at_least_float32, cayley_minus_identity, skew, top_svd
from ..variant import Params
from ._directions import Turned


@dataclass(frozen=True, kw_only=True)
class SSVD(Turned):
    """Structured SVD-guided adaptation, Wang et al. 2025 (arXiv 2509.02830).

    Trainable: k [r (r - 1) / 2], dS [r].
    """

    card = Card(
        title="Structured SVD-guided adaptation",
        authors="Wang et al. 2025",
        source="2509.02830",
        formula="base_out + x (U ((S + dS) G - S) V)ᵀ",
        trainable={"k": "r * (r - 1) // 2", "dS": "r"},
        reads="init",
        lr=0.03,
        beside_peft="not in PEFT",
    )

    r: int = 64
    """Number of singular directions, from 1 to min(d_in, d_out)."""
    approximate: bool = False
    """Take G = I - 2K, the paper's default, without a solve: orthogonal up to O(K²)."""

    def __post_init__(self):
        check_rank(self)
        check_choice(self, "approximate", (False, True))

    def init(self, weight, generator, stats=None):
        check_fits(self, weight.shape)
        U, S, V = top_svd(weight.dense(), self.r)
        k = torch.zeros(self.r * (self.r - 1) // 2, dtype=torch.float32)
        dS = torch.zeros(self.r, dtype=torch.float32)
        return Params({"k": k, "dS": dS}, frozen={"U": U, "S": S, "V": V})

    def core(self, params):
        K = skew(at_least_float32(params["k"]), self.r)
        turn = -2 * K if self.approximate else cayley_minus_identity(-K)  # G - I
        return {"turn": turn, "dS": params["dS"]}

    def act(self, p, core):
        turned = F.linear(p, core["turn"].to(p.dtype))
        return core["dS"].to(p.dtype) * (p + turned) + core["S"].to(p.dtype) * turned
