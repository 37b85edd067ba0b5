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

from ..numerics import at_least_float32, low_rank_difference, low_rank_update, top_svd
from ..variant import Params, Variant, check_positive, check_rank


@dataclass(frozen=True, kw_only=True)
class PiSSA(Variant):
    """Principal singular values adaptation, Meng et al. 2024 (arXiv 2404.02948). Trainable: A [r, d_in], B [d_out, r]."""

    r: int = 8  # rank, from 1 to min(d_in, d_out)
    alpha: float = 8.0  # scale of the update before the division by r, above 0

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def init(self, weight, generator, stats=None):
        U, S, V = top_svd(weight, self.r, "PiSSA")
        root = (S / self.scale).sqrt()  # [r]
        A0, B0 = root[:, None] * V, U * root
        return Params({"A": A0.clone(), "B": B0.clone()}, frozen={"A0": A0, "B0": B0})

    def apply(self, x, base_out, weight, params):
        A, B = low_rank_difference(params["A"], params["B"], params["A0"], params["B0"])
        return low_rank_update(base_out, x, A, B, self.scale)

    def merged(self, weight, params):
        # W + s (BA - B0A0)
        A, B = low_rank_difference(params["A"], params["B"], params["A0"], params["B0"])
        return at_least_float32(weight.dense()) + self.scale * B @ A, weight.bias
