"""DeLoRA: a low-rank update of normalised rank-one terms, bounded by one scalar. Bini et al. 2025, arXiv 2503.18225.

    Δ(A, B, lam) = (lam / r) Σ_j b̂_j â_jᵀ diag(wn) [d_out, d_in]        wn [d_in] = column norms of W, frozen
    â_j = A_j / max(|A_j|, ε),  b̂_j = B^j / max(|B^j|, ε)               A_j = row j of A, B^j = column j of B, ε = 1e-4
    out = base_out + x Δᵀ                                       init="peft"
    out = base_out + x (Δ(A, B, lam) - Δ(A0, B0, lambda0))ᵀ      init="paper"

    |Δ|_F <= |lam| max wn, whatever the size of A and B

"peft" (PEFT, lora-lite): A is Kaiming-uniform and B zero, so the output at init is the base output to the bit. Because |B^j|
is clamped at ε, the first gradient of B is lam / (r |A_j| ε) times that of LoRA and the first Adam step jumps to the full
size of the update whatever the learning rate. "paper" (Eq. 9): A and B are both Kaiming-uniform and a frozen copy is
subtracted, with lam at lambda0; no jump. With wn folded into â and lam / r into b̂ that difference has the telescoped form
of PiSSA, so it too is zero to the bit. (The authors' code subtracts the copy under the current lam, and lets it share the
storage of A.)

The paper's formula has one norm of W; the authors' code, PEFT and this file take one per input channel. The weight is read
once, at init, dequantized. lambda0 = 15 is PEFT's default.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..numerics import at_least_float32, kaiming, low_rank_difference, low_rank_update
from ..variant import Params, Variant, check_choice, check_positive, check_rank

EPS = 1e-4


class Start(str):
    """The field `init` of a DeLoRA, which is a name ("peft", "paper") and at the same time the method `Variant.init`."""

    variant: DeLoRA

    def __call__(self, weight, generator, stats=None):
        return self.variant.draw(weight, generator)


@dataclass(frozen=True, kw_only=True)
class DeLoRA(Variant):
    """Decoupled low-rank adaptation, Bini et al. 2025 (arXiv 2503.18225). Trainable: A [r, d_in], B [d_out, r], lam []."""

    r: int = 8  # rank, at least 1
    lambda0: float = 15.0  # initial bound of the update relative to the column norms of W, above 0 (0 has no gradient)
    init: str = "peft"  # pyright: ignore  # "peft": B = 0; "paper": subtract a frozen copy

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "lambda0")
        object.__setattr__(self, "init", str(self.init) if isinstance(self.init, str) else self.init)
        check_choice(self, "init", ("peft", "paper"))
        start = Start(self.init)
        start.variant = self
        object.__setattr__(self, "init", start)

    def draw(self, weight, generator):
        d_out, d_in = weight.shape
        A, lam = kaiming(self.r, d_in, generator), torch.tensor(float(self.lambda0))
        wn = at_least_float32(weight.dense()).norm(dim=0)  # [d_in]
        if self.init == "peft":
            return Params({"A": A, "B": torch.zeros(d_out, self.r), "lam": lam}, frozen={"wn": wn})
        B = kaiming(d_out, self.r, generator)
        return Params({"A": A, "B": B, "lam": lam}, frozen={"wn": wn, "A0": A.clone(), "B0": B.clone()})

    def factors(self, params):
        """`(A', B')` with Δ = B'A' (minus the Δ of the anchors, where there are some)."""
        A, B, wn = params["A"], params["B"], params["wn"].to(params["A"].dtype)
        A1, B1 = normalised(A, 1) * wn, normalised(B, 0) * (params["lam"] / self.r)
        if "A0" not in params:
            return A1, B1
        A0, B0 = params["A0"].to(A.dtype), params["B0"].to(B.dtype)
        lambda0 = torch.full_like(params["lam"], self.lambda0)
        return low_rank_difference(A1, B1, normalised(A0, 1) * wn, normalised(B0, 0) * (lambda0 / self.r))

    def apply(self, x, base_out, weight, params):
        return low_rank_update(base_out, x, *self.factors(params))

    def merged(self, weight, params):
        # W + Δ
        A, B = self.factors(params)
        return at_least_float32(weight.dense()) + B @ A, weight.bias


def normalised(t, dim):
    """`t` over its norms along `dim`, which are clamped at ε. `norm` has gradient 0 at 0, where sqrt would have NaN."""
    return t / t.norm(dim=dim, keepdim=True).clamp(min=EPS)
