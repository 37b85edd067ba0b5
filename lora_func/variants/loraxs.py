"""LoRA-XS: a small matrix between frozen singular vectors. Bałazy et al. 2024, arXiv 2405.17604.

    out = base_out + s ((x Aᵀ) Rᵀ) Bᵀ,   A = S_r V_r [r, d_in],   B = U_r [d_out, r]   s = alpha / r

U_r S_r V_r are the top singular triplets of the weight, which is read once, at init. Only R [r, r]
is trained, so the count does not depend on the width of the layer. R starts at zero, where it has
a gradient, since A and B are not zero; the authors draw it from N(0, 1e-10).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..checks import check_choice, check_fits, check_positive, check_rank
from ..linalg import top_svd
from ..variant import Params
from ._low_rank import Product


@dataclass(frozen=True, kw_only=True)
class LoRAXS(Product):
    """LoRA with an extremely small number of parameters, Bałazy et al. 2024 (arXiv 2405.17604).

    Trainable: R [r, r].
    """

    card = Card(
        title="A small matrix between frozen singular vectors",
        authors="Bałazy et al. 2024",
        source="2405.17604",
        formula="base_out + s ((x Aᵀ) Rᵀ) Bᵀ",
        trainable={"R": "r, r"},
        reads="init",
        lr=4e-3,
        width=4,
    )
    prepares_together = True

    r: int = 32
    """Number of singular triplets, from 1 to min(d_in, d_out); r² numbers are trained."""
    alpha: float | None = None
    """Numerator of the scale s = alpha / r of the update, above 0. None: r, so that s = 1."""
    svd: str = "exact"
    """How the weight is decomposed: "exact", or "randomized", which is much faster for a small r on
    a large layer."""
    niter: int = 4
    """Power iterations of the randomized SVD, at least 1; unused by the exact one."""

    def __post_init__(self):
        check_rank(self)
        if self.alpha is not None:
            check_positive(self, "alpha")
        check_choice(self, "svd", ("exact", "randomized"))
        check_rank(self, "niter")

    @property
    def scale(self):
        return 1.0 if self.alpha is None else self.alpha / self.r

    def init(self, weight, generator, stats=None):
        check_fits(self, weight.shape)
        niter = self.niter if self.svd == "randomized" else None
        U, S, V = top_svd(weight.dense(), self.r, niter, generator)
        R = torch.zeros(self.r, self.r, dtype=torch.float32)
        return Params({"R": R}, frozen={"A": S[:, None] * V, "B": U})

    def pair(self, params):
        # B R is [d_out, r]: one product for each call, whatever the number of tokens
        return params["A"], params["B"] @ params["R"].to(params["B"].dtype)
