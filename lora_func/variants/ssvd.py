"""SSVD: rotated right singular vectors and shifted singular values. Wang, Watanabe & Van hamme 2025, arXiv 2509.02830.

    p = x V_rᵀ,    G = (I - K)(I + K)⁻¹,    out = base_out + [ dS * (G p) + S_r * ((G - I) p) ] U_rᵀ

K [r, r] is skew-symmetric, given by its upper triangle k. G - I = -2 (I + K)⁻¹ K and dS are zero at init, so the output is
the base output to the bit. `approximate` takes the paper's default G - I = -2K, which is orthogonal up to O(K²) and saves the
solve of r x r. The output moves within the span of U_r. The paper gives r as a share of the spectrum, and no values for
language models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..numerics import add_along, at_least_float32, full_precision, skew, top_svd
from ..variant import Params, Variant, check_choice, check_rank


@full_precision
def inverse_cayley_minus_identity(K):
    """`(I - K)(I + K)⁻¹ - I = -2 (I + K)⁻¹ K`: zero to the bit for K = 0."""
    return torch.linalg.solve(torch.eye(K.shape[-1], dtype=K.dtype, device=K.device) + K, -2 * K)


@dataclass(frozen=True, kw_only=True)
class SSVD(Variant):
    """Structured SVD-guided adaptation, Wang et al. 2025 (arXiv 2509.02830). Trainable: k [r(r-1)/2], dS [r]."""

    r: int = 64  # singular directions, from 1 to min(d_in, d_out)
    approximate: bool = False  # G = I - 2K, without a solve

    def __post_init__(self):
        check_rank(self)
        check_choice(self, "approximate", (False, True))

    def init(self, weight, generator, stats=None):
        U, S, V = top_svd(weight, self.r, "SSVD")
        trainable = {"k": torch.zeros(self.r * (self.r - 1) // 2), "dS": torch.zeros(self.r)}
        return Params(trainable, frozen={"U": U, "S": S, "V": V})

    def core(self, p, params):
        """What comes out along U for the coordinates `p [.., r]` along V."""
        K = skew(at_least_float32(params["k"]), self.r)
        Q = -2 * K if self.approximate else inverse_cayley_minus_identity(K)  # G - I
        turned = F.linear(p, Q.to(p.dtype))
        return params["dS"].to(p.dtype) * (p + turned) + params["S"].to(p.dtype) * turned

    def apply(self, x, base_out, weight, params):
        p = F.linear(x, params["V"].to(x.dtype))  # [.., r]
        return add_along(base_out, self.core(p, params), params["U"])

    def merged(self, weight, params):
        # W + U core(V): the rows of Vᵀ go through the core
        W = at_least_float32(weight.dense())
        return W + params["U"].to(W.dtype) @ self.core(params["V"].to(W.dtype).mT, params).mT, weight.bias
