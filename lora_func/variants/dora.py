"""DoRA: a low-rank update of each output row's direction, and a magnitude for each row.
Liu et al. 2024, arXiv 2402.09353.

    V = W + s B A,    n_i = |V_i| (row i),    ρ = m / n,    s as in LoRA
    u = base_out + s (x Aᵀ) Bᵀ,    out = u + (ρ - 1)(u - b)                 ( = x (ρ V)ᵀ + b )

A is Kaiming-uniform, B zero, and m = n, computed by the same function. So ρ is exactly 1 and the
output at init is the base output to the bit. The paper writes the norm over columns; its released
code, PEFT and this file normalize each OUTPUT row and leave the bias unscaled. Autograd treats n as
a constant (paper, section 4.3): the gradient is not the derivative of the function unless
`detach_norm=False`.

The norm needs no d_out x d_in temporary. With C = W Aᵀ [d_out, r], which is r rows through the
frozen layer, and the frozen squared row norms w2 of W [d_out],

    n² = w2 + 2 s Σ_r C ∘ B + s² Σ_r (B A Aᵀ) ∘ B

The sum cancels if a row of V is far shorter than that of W. Below eps w2, which the dtype cannot
resolve, n² is clamped. The weight is read at init for w2, and on each call for C. Defaults as LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_choice
from ..fused import low_rank_linear
from ..linalg import (
    at_least_float32,
    full_precision,
    kaiming,
    low_rank_update,
    over_rows,
    weighted_sum,
)
from ..variant import Params
from ._gate import gated, gated_over
from ._low_rank import LowRank

TINY = 1e-30  # a row of zeros needs a norm to divide by


@dataclass(frozen=True, kw_only=True)
class DoRA(LowRank):
    """Weight-decomposed adaptation, Liu et al. 2024 (arXiv 2402.09353).

    Trainable: A [r, d_in], B [d_out, r], m [d_out].
    """

    card = Card(
        title="Weight decomposition",
        authors="Liu et al. 2024",
        source="2402.09353",
        formula="x (m / |W + s B A| (W + s B A))ᵀ + b",
        trainable={"A": "r, d_in", "B": "d_out, r", "m": "d_out"},
        reads="rows",
        lr=2e-3,
        peft=Peft("LoraConfig", {"use_dora": True}),
        beside_peft="the same, gradients included; PEFT forms the dense update on each call",
    )
    broadcasts = rounds_last = prepares_together = True

    detach_norm: bool = True
    """Treat the row norms n as constants in the gradient, as the paper does."""

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "detach_norm", (False, True))

    @property
    def exact_gradient(self):
        return not self.detach_norm

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        w2 = at_least_float32(weight.dense()).square().sum(1).clamp(min=TINY)  # [d_out]
        B = torch.zeros(d_out, self.r, dtype=torch.float32)
        A = kaiming(self.r, d_in, generator)
        return Params({"A": A, "B": B, "m": w2.sqrt()}, frozen={"w2": w2})

    def gain(self, weight, params):
        """ρ = m / n `[d_out]`. n is rounded to the dtype of m, so that ρ is 1 at init in any."""
        A, B = params["A"], params["B"]
        if self.detach_norm:
            A, B = A.detach(), B.detach()
        n = row_norms(A, B, weight, params["w2"], self.scale)
        return params["m"] / n.to(params["m"].dtype)

    def prepare(self, weight, params, dtype):
        rho = self.gain(weight, params)
        A, B = params["A"], params["B"]
        p = {"A": A.to(dtype), "B": B.to(dtype), "gain": (rho - 1).to(dtype)}
        return p if weight.bias is None else {**p, "b": weight.bias.to(dtype)}

    def apply(self, x, base_out, weight, params):
        p = self.prepared(weight, params, x.dtype)
        return stretched(low_rank_update(base_out, x, p["A"], p["B"], self.scale), p, gated)

    def fused(self, x, W, b, params):
        u = low_rank_linear(x, W, b, params["A"], params["B"], self.scale)
        return stretched(u, params, gated_over)

    def merged(self, weight, params):
        # ρ (W + s B A)
        A, B = (at_least_float32(params[name]) for name in ("A", "B"))
        V = at_least_float32(weight.dense()) + self.scale * B @ A
        return self.gain(weight, params)[:, None] * V, weight.bias


def stretched(u, p, gated):
    """`ρ (u - b) + b`, from the prepared ρ - 1 and b. `gated(u, d)`: u + u ∘ d."""
    gain = over_rows(p["gain"]).to(u.dtype)
    return gated(u, gain) if "b" not in p else torch.addcmul(u, u - p["b"].to(u.dtype), gain)


@full_precision
def row_norms(A, B, weight, w2, s):
    """|W + s B A| for each row, `[d_out]`: `A [r, d_in]`, `B [d_out, r]`, w2 = |W|² by row."""
    A, B = A.to(w2.dtype), B.to(w2.dtype)
    C = weight(A).mT  # W Aᵀ [d_out, r]
    n2 = w2 + (weighted_sum(C, B, A @ A.mT, beta=2 * s, alpha=s * s) * B).sum(-1)
    return torch.maximum(n2, torch.finfo(w2.dtype).eps * w2).sqrt()
