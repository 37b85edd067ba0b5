"""DoRA: a low-rank update of the direction of each output row, and a magnitude for each. Liu et al. 2024, arXiv 2402.09353.

    V = W + s B A,    n_i = |V_i| (row i),    ρ = m / n,    s = alpha / r
    out = base_out + (ρ - 1)(base_out - b) + ρ s (x Aᵀ) Bᵀ                      ( = x (ρ V)ᵀ + b )

A is Kaiming-uniform, B zero and m = n, computed by the same function, so ρ is exactly 1 and the output at init is the base
output to the bit. The paper writes the norm over columns; its released code, PEFT and this file normalise each OUTPUT row,
and leave the bias unscaled. n is a constant to autograd (paper section 4.3, `detach_norm`), so the gradient is not the
derivative of the function unless `detach_norm=False`.

The norm needs no d_out x d_in temporary. With C = W Aᵀ [d_out, r], which is r rows through the frozen layer, and the frozen
w2 = squared row norms of W [d_out],

    n² = w2 + 2 s Σ_r C ∘ B + s² Σ_r (B A Aᵀ) ∘ B

It cancels where a row of V is far smaller than that of W: below eps w2, which the dtype cannot resolve, n² is clamped.
The weight is read at init for w2 and on each call for C. Defaults as LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..numerics import at_least_float32, full_precision, kaiming, low_rank_update
from ..variant import Params, Variant, check_choice, check_positive, check_rank

TINY = 1e-30  # of the squared norm of a row, so that a row of zeros has a norm to divide by


@dataclass(frozen=True, kw_only=True)
class DoRA(Variant):
    """Weight decomposition, Liu et al. 2024 (arXiv 2402.09353). Trainable: A [r, d_in], B [d_out, r], m [d_out]."""

    r: int = 8  # rank, at least 1
    alpha: float = 16.0  # scale of the update before the division by r, above 0
    detach_norm: bool = True  # treat the row norms as constants in the gradient, as the paper does

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")
        check_choice(self, "detach_norm", (False, True))

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        w2 = at_least_float32(weight.dense()).square().sum(1).clamp(min=TINY)  # [d_out]
        trainable = {"A": kaiming(self.r, d_in, generator), "B": torch.zeros(d_out, self.r), "m": w2.sqrt()}
        return Params(trainable, frozen={"w2": w2})

    def gain(self, weight, A, B, params):
        """ρ = m / n, `[d_out]`, in the dtype of m: rounding n to it keeps ρ = 1 at init for parameters of any dtype."""
        if self.detach_norm:
            A, B = A.detach(), B.detach()
        return params["m"] / row_norms(A, B, weight, params["w2"], self.scale).to(params["m"].dtype)

    def apply(self, x, base_out, weight, params):
        A, B = params["A"].to(x.dtype), params["B"]
        rho = self.gain(weight, A, B, params)
        centred = base_out if weight.bias is None else base_out - weight.bias.to(base_out.dtype)
        scaled = torch.addcmul(base_out, centred, (rho - 1).to(base_out.dtype))  # base_out + (ρ - 1)(base_out - b)
        return low_rank_update(scaled, x, A, rho[:, None] * B, self.scale)

    def merged(self, weight, params):
        # ρ (W + s B A)
        A, B = params["A"], params["B"]
        V = at_least_float32(weight.dense()) + self.scale * B @ A
        return self.gain(weight, A, B, params)[:, None] * V, weight.bias


@full_precision
def row_norms(A, B, weight, w2, s):
    """|W + s B A| for each row, `[d_out]`, from `A [r, d_in]`, `B [d_out, r]` and the squared row norms `w2` of W."""
    C = weight(A).to(w2.dtype).mT  # W Aᵀ [d_out, r]
    A, B = A.to(w2.dtype), B.to(w2.dtype)
    n2 = w2 + (torch.addmm(C, B, A @ A.mT, beta=2 * s, alpha=s * s) * B).sum(-1)
    return torch.maximum(n2, torch.finfo(w2.dtype).eps * w2).sqrt()
