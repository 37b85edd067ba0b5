"""ABBA: the Hadamard product of two low-rank matrices, one from the weight. Singhal et al. 2025,
arXiv 2505.14238.

    out = base_out + s x ((B1 A1) ∘ (B2 A2))ᵀ                                       s = alpha / r

B1 = U_r sqrt(S_r) and A1 = sqrt(S_r) V_r are made of the top singular triplets of the weight, which
is read once, at init. B2 starts at zero, so the output at init is the base output to the bit. All
four are trained. As in `loha`, nothing of size d_out x d_in is formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..checks import check_choice, check_fits, check_positive, check_rank
from ..linalg import kaiming, top_svd
from ..variant import Params
from ._low_rank import Product
from .loha import hadamard


@dataclass(frozen=True, kw_only=True)
class ABBA(Product):
    """Hadamard product of two low-rank matrices, Singhal et al. 2025 (arXiv 2505.14238).

    Trainable: A1, A2 [r, d_in], B1, B2 [d_out, r].
    """

    card = Card(
        title="Hadamard product with a part of the weight",
        authors="Singhal et al. 2025",
        source="2505.14238",
        formula="base_out + s x ((B1 A1) ∘ (B2 A2))ᵀ",
        trainable={"A1": "r, d_in", "B1": "d_out, r", "A2": "r, d_in", "B2": "d_out, r"},
        reads="init",
        lr=0.01,
    )

    r: int = 8
    """Rank of each of the two products, from 1 to min(d_in, d_out)."""
    alpha: float = 16.0
    """Numerator of the scale s = alpha / r of the update, above 0."""
    svd: str = "exact"
    """How the weight is decomposed: "exact", or "randomized" with 4 power iterations, which is much
    faster for a small r on a large layer."""

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")
        check_choice(self, "svd", ("exact", "randomized"))

    @property
    def scale(self):
        return self.alpha / self.r

    def init(self, weight, generator, stats=None):
        check_fits(self, weight.shape)
        d_out, d_in = weight.shape
        U, S, V = top_svd(
            weight.dense(), self.r, 4 if self.svd == "randomized" else None, generator
        )
        A2 = kaiming(self.r, d_in, generator)
        B2 = torch.zeros(d_out, self.r, dtype=torch.float32)
        return Params({"A1": S.sqrt()[:, None] * V, "B1": U * S.sqrt(), "A2": A2, "B2": B2})

    def pair(self, params):
        return hadamard(params["B1"], params["A1"], params["B2"], params["A2"])
