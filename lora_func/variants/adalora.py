"""AdaLoRA: LoRA in the form of an SVD, whose ranks are allocated. Zhang et al. 2023,
arXiv 2303.10512.

    out = base_out + s ((x Aᵀ) ∘ E) Bᵀ                                     s = alpha / (r + 1e-5)

E [r] starts at zero, so the output at init is the base output to the bit; A and B start from
N(0, 0.02²). r is the rank at the start. `lf.RankAllocator` takes triplets (A_i, E_i, B_i) away
while the training runs, by zeros in E. The paper keeps A and B near orthonormal by a term in the
loss, `orthogonality`, which PEFT weighs by 0.5. The 1e-5 in s is PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_positive, check_rank
from ..linalg import at_least_float32, normal
from ..variant import Params
from ._low_rank import Product


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Product):
    """Adaptive low-rank adaptation, Zhang et al. 2023 (arXiv 2303.10512).

    Trainable: A [r, d_in], B [d_out, r], E [r].
    """

    card = Card(
        title="Ranks allocated while training",
        authors="Zhang et al. 2023",
        source="2303.10512",
        formula="base_out + s ((x Aᵀ) ∘ E) Bᵀ",
        trainable={"A": "r, d_in", "B": "d_out, r", "E": "r"},
        reads="nothing",
        lr=0.01,
        peft=Peft("AdaLoraConfig", {"total_step": 100}, rank="init_r"),
        beside_peft="the same function; the allocator is a pure step of the loop",
    )
    prepares_together = True

    r: int = 12
    """Rank of each layer at the start, at least 1. The default is PEFT's init_r."""
    alpha: float = 16.0
    """Numerator of the scale s = alpha / (r + 1e-5) of the update, above 0."""

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")

    @property
    def scale(self):
        return self.alpha / (self.r + 1e-5)

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        A, B = (normal(shape, 0.02, generator) for shape in ((self.r, d_in), (d_out, self.r)))
        return Params({"A": A, "B": B, "E": torch.zeros(self.r, dtype=torch.float32)})

    def pair(self, params):
        return params["E"][:, None] * params["A"], params["B"]


def orthogonality(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """`|A Aᵀ - I|² + |Bᵀ B - I|²` (Frobenius), for the loss: equation 4 of the paper."""
    A, B = at_least_float32(A), at_least_float32(B)
    eye = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    return (A @ A.mT - eye).square().sum() + (B.mT @ B - eye).square().sum()
