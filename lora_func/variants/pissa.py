"""PiSSA: LoRA that starts from the principal singular triplets of the weight. Meng et al. 2024, arXiv 2404.02948.

    out = base_out + s [ (x Aᵀ)(B - B0)ᵀ + (x (A - A0)ᵀ) B0ᵀ ]                  ( = base_out + s x (BA - B0A0)ᵀ )

    A0 = sqrt(S_r / s) V_r [r, d_in],   B0 = U_r sqrt(S_r / s) [d_out, r],   s B0 A0 = U_r S_r V_r,   s = alpha / r

A and B start at the frozen A0 and B0. The paper subtracts s B0 A0 from the weight; here the base keeps its weight and the
difference is telescoped, so that both factors that carry the change are literally zero at init: the output is the base
output to the bit in every dtype (the paper's form starts 6e-3 off in bfloat16), and a quantized base works. That is not
QPiSSA, which quantizes the residual. The weight is read once, at init, for its SVD. Dividing S by s makes the update
independent of alpha, as in PEFT and lora-lite; the paper has alpha = r, the default here. A0 and B0 belong to the file: the
signs of singular vectors are not reproducible between machines.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..numerics import anchored, anchored_update, anchored_weight, top_svd
from ..variant import Variant, check_choice, check_positive, check_rank


@dataclass(frozen=True, kw_only=True)
class PiSSA(Variant):
    """Principal singular values adaptation, Meng et al. 2024 (arXiv 2404.02948). Trainable: A [r, d_in], B [d_out, r]."""

    r: int = 8  # rank, from 1 to min(d_in, d_out)
    alpha: float = 8.0  # scale of the update before the division by r, above 0
    svd: str = "exact"  # or "randomized": much faster for a small r on a large layer, drawn from the generator
    niter: int = 4  # power iterations of the randomized one

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")
        check_choice(self, "svd", ("exact", "randomized"))
        check_rank(self, "niter")

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def init(self, weight, generator, stats=None):
        U, S, V = top_svd(weight, self.r, "PiSSA", self.niter if self.svd == "randomized" else None, generator)
        root = (S / self.scale).sqrt()  # [r]
        return anchored(root[:, None] * V, U * root)

    def apply(self, x, base_out, weight, params):
        return anchored_update(base_out, x, params, self.scale)

    def merged(self, weight, params):
        return anchored_weight(weight, params, self.scale), weight.bias
