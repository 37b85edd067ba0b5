"""TinyLoRA: a handful of trained numbers. Morris et al. 2026, arXiv 2602.04118.

    out = base_out + ((x Aᵀ) Rᵀ) Bᵀ,   R = Σ_i v_i P_i

    A = V_r [r, d_in],   B = U_r S_r [d_out, r]

U_r S_r V_r are the top singular triplets of the weight, read once, at init. The P_i [r, r] are
fixed and random, N(0, 1/r) as in PEFT. Only v [n] is trained, from zero, so the output at init is
the base output to the bit. With `share`, one v serves all layers: n numbers for a whole model, few
enough for evolution strategies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_choice, check_fits, check_rank
from ..linalg import normal, top_svd
from ..variant import Params
from ._low_rank import Product


@dataclass(frozen=True, kw_only=True)
class TinyLoRA(Product):
    """A few numbers between frozen singular vectors, Morris et al. 2026 (arXiv 2602.04118).

    Trainable: v [n], of each layer or, with `share`, of all.
    """

    card = Card(
        title="A few numbers between frozen singular vectors",
        authors="Morris et al. 2026",
        source="2602.04118",
        formula="base_out + ((x Aᵀ) (Σ v_i P_i)ᵀ) Bᵀ",
        trainable={"v": "n"},
        reads="init",
        lr=0.01,
        peft=Peft("TinyLoraConfig"),
        beside_peft="the same function; PEFT draws the P_i from a seed of its own",
    )
    prepares_together = True

    r: int = 2
    """Number of singular triplets, from 1 to min(d_in, d_out)."""
    n: int = 64
    """Number of trained numbers, at least 1: the length of v."""
    share: bool = False
    """Train one v for all layers: n numbers for the whole model. False: one for each layer."""
    svd: str = "exact"
    """How the weight is decomposed: "exact", or "randomized" with 4 power iterations, which is much
    faster for a small r on a large layer."""

    def __post_init__(self):
        check_rank(self)
        check_rank(self, "n")
        check_choice(self, "share", (False, True))
        check_choice(self, "svd", ("exact", "randomized"))

    def init(self, weight, generator, stats=None):
        check_fits(self, weight.shape)
        U, S, V = top_svd(
            weight.dense(), self.r, 4 if self.svd == "randomized" else None, generator
        )
        P = normal((self.n, self.r, self.r), self.r**-0.5, generator)
        frozen = {"A": V, "B": U * S, "P": P}
        return Params({} if self.share else self.start(), frozen=frozen)

    def init_shared(self, weights, generator):
        return Params(self.start() if self.share else {})

    def start(self):
        """v at zero."""
        return {"v": torch.zeros(self.n, dtype=torch.float32)}

    def pair(self, params):
        B = params["B"]
        R = torch.einsum("n,nij->ij", params["v"].to(B.dtype), params["P"].to(B.dtype))
        return params["A"], B @ R
