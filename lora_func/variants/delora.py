"""DeLoRA: a low-rank update of normalized rank-one terms, bounded by one scalar.
Bini et al. 2025, arXiv 2503.18225.

    Δ(A, B, lam) = (lam / r) Σ_j b̂_j â_jᵀ diag(wn) [d_out, d_in]      wn [d_in] = column norms of W
    â_j = A_j / max(|A_j|, ε),  b̂_j = B^j / max(|B^j|, ε)      A_j = row j, B^j = column j, ε = 1e-4
    out = base_out + x Δᵀ                                       start="peft"
    out = base_out + x (Δ(A, B, lam) - Δ(A0, B0, lambda0))ᵀ     start="paper"

    |Δ|_F <= |lam| max wn, whatever the size of A and B

start="peft" (PEFT, lora-lite): A is Kaiming-uniform and B zero. Because |B^j| is clamped at ε, the
first gradient of B is lam / (r |A_j| ε) times LoRA's, and the first step of Adam moves the update
to its full size whatever the learning rate. start="paper" (Eq. 9): A and B are Kaiming-uniform and
a frozen copy is subtracted, with lam at lambda0; the first step does not jump. With wn folded into
â and lam / r into b̂, that difference telescopes as in PiSSA. Either way the output at init is the
base output to the bit. (The authors' code subtracts the copy under the current lam.)

The paper's formula has one norm of W; the authors' code, PEFT and this file take one for each
input channel. The weight is read once, at init, dequantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..card import Card, Peft
from ..checks import check_choice, check_positive, check_rank
from ..linalg import at_least_float32, kaiming, low_rank_difference
from ..variant import Params
from ._low_rank import Product

EPS = 1e-4


@dataclass(frozen=True, kw_only=True)
class DeLoRA(Product):
    """Decoupled low-rank adaptation, Bini et al. 2025 (arXiv 2503.18225).

    Trainable: A [r, d_in], B [d_out, r], lam [].
    """

    card = Card(
        title="Decoupled low-rank adaptation",
        authors="Bini et al. 2025",
        source="2503.18225",
        formula="base_out + (lam / r) Σ_j x wn â_j b̂_jᵀ",
        trainable={"A": "r, d_in", "B": "d_out, r", "lam": ""},
        reads="init",
        lr=0.03,
        settings={"lambda0": 1.0, "start": "paper"},
        peft=Peft("DeloraConfig"),
        beside_peft='start="peft" is the same; start="paper" is Eq. 9, without the jump',
    )
    prepares_together = True
    renamed: ClassVar = {"init": "start"}

    r: int = 8
    """Number of rank-one terms, at least 1."""
    lambda0: float = 15.0
    """Where lam starts, above 0. It bounds the update: its Frobenius norm is at most lam times the
    largest column norm of W. 15 is PEFT's default."""
    start: str = "peft"
    """How A and B start. "peft": B is zero, and the first step jumps. "paper": a frozen copy is
    subtracted (equation 9 of the paper), and it does not."""

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "lambda0")
        check_choice(self, "start", ("peft", "paper"))

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        wn = at_least_float32(weight.dense()).norm(dim=0)  # [d_in]
        A = kaiming(self.r, d_in, generator)
        lam = torch.tensor(float(self.lambda0), dtype=torch.float32)
        if self.start == "peft":
            B = torch.zeros(d_out, self.r, dtype=torch.float32)
            return Params({"A": A, "B": B, "lam": lam}, frozen={"wn": wn})
        B = kaiming(d_out, self.r, generator)
        anchors = {"A0": A.clone(), "B0": B.clone()}
        return Params({"A": A, "B": B, "lam": lam}, frozen={"wn": wn, **anchors})

    def pair(self, params):
        # Δ = B'A', minus that of the anchors
        A, B, wn = params["A"], params["B"], params["wn"].to(params["A"].dtype)
        A1, B1 = normalized(A, 1) * wn, normalized(B, 0) * (params["lam"] / self.r)
        if "A0" not in params:
            return A1, B1
        A0, B0 = params["A0"].to(A.dtype), params["B0"].to(B.dtype)
        lambda0 = torch.full_like(params["lam"], self.lambda0)
        B2 = normalized(B0, 0) * (lambda0 / self.r)
        return low_rank_difference(A1, B1, normalized(A0, 1) * wn, B2)


def normalized(t, dim):
    """`t` over its norms along `dim`, clamped at ε. (The gradient of `norm` at 0 is 0, not NaN.)"""
    return t / t.norm(dim=dim, keepdim=True).clamp(min=EPS)
