"""LoHa: the Hadamard product of two low-rank matrices. Hyeon-Woo et al. 2021, arXiv 2108.06098
(FedPara); Yeh et al. 2023, arXiv 2309.14859 (LyCORIS).

    out = base_out + s x ((w1a w1b) ∘ (w2a w2b))ᵀ                                   s = alpha / r

w1a, w2a [d_out, r], w1b, w2b [r, d_in]. The product of two matrices of rank r has rank r² at most:
with the row-wise Khatri-Rao products KA [r², d_in] of w1b and w2b, and KB [d_out, r²] of w1a and
w2a, it is KB KA, and nothing of size d_out x d_in is formed. w2b starts at zero, so KA is zero and
the output at init is the base output to the bit; then w2b alone has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_positive, check_rank
from ..linalg import kaiming
from ..variant import Params
from ._low_rank import Product


def hadamard(w1a, w1b, w2a, w2b):
    """`KA [r², d_in]` and `KB [d_out, r²]` with `KB KA = (w1a w1b) ∘ (w2a w2b)`."""
    KA = (w1b[:, None] * w2b[None]).flatten(0, 1)
    KB = (w1a[:, :, None] * w2a[:, None]).flatten(1, 2)
    return KA, KB


@dataclass(frozen=True, kw_only=True)
class LoHa(Product):
    """Low-rank Hadamard product, Hyeon-Woo et al. 2021 (arXiv 2108.06098).

    Trainable: w1a, w2a [d_out, r], w1b, w2b [r, d_in].
    """

    card = Card(
        title="Hadamard product of two low-rank matrices",
        authors="Hyeon-Woo et al. 2021",
        source="2108.06098",
        formula="base_out + s x ((w1a w1b) ∘ (w2a w2b))ᵀ",
        trainable={"w1a": "d_out, r", "w1b": "r, d_in", "w2a": "d_out, r", "w2b": "r, d_in"},
        reads="nothing",
        lr=0.01,
        peft=Peft("LoHaConfig"),
        beside_peft="the same function; PEFT forms the dense update",
    )

    r: int = 8
    """Rank of each of the two products, at least 1. The rank of the update is r² at most."""
    alpha: float = 8.0
    """Numerator of the scale s = alpha / r of the update, above 0."""

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")

    @property
    def scale(self):
        return self.alpha / self.r

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        return Params(
            {
                "w1a": kaiming(d_out, self.r, generator),
                "w1b": kaiming(self.r, d_in, generator),
                "w2a": kaiming(d_out, self.r, generator),
                "w2b": torch.zeros(self.r, d_in, dtype=torch.float32),
            }
        )

    def pair(self, params):
        return hadamard(*(params[name] for name in ("w1a", "w1b", "w2a", "w2b")))
