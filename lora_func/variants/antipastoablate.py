"""AntiPaSTO-ablate: removes learned directions from the output. The operator of Arditi et al. 2024, arXiv 2406.11717; this
form is lora-lite's.

    F = U Ĉ [d_out, k],    out = base_out - c ( ((base_out - b) F) * clamp(a, 0, 1) ) Fᵀ

U [d_out, r] are the top left singular vectors of W, Ĉ [r, k] an orthonormal form of the learned c: c / |c| for k = 1, the Q
of its QR for more. For coeff and a in [0, 1] it contracts; a = 1 removes the directions wholly. The bias is not ablated. With
a = 0 the direction could not learn, so a starts at `init_alpha` and the output at init is NOT the base output: it lacks that
share of k directions. With calibration c starts at the top eigenvectors of E[z zᵀ], z = (y - b) U, otherwise at random. The
clamp has no gradient outside of [0, 1]: keep a inside, after a step that left it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..calibrate import OutputMoments
from ..errors import LoraFuncError
from ..numerics import add_along, at_least_float32, coordinates, cored, full_precision, top_svd
from ..variant import Params, Variant, check_number, check_positive, check_rank


@full_precision
def directions(U, c):
    """F [d_out, k], in the dtype of U. (|c| + 1e-6, as lora-lite has it, would leave 1e-6 of the direction behind.)"""
    c = at_least_float32(c)
    C = c / c.norm().clamp(min=1e-6) if c.shape[-1] == 1 else torch.linalg.qr(c).Q
    return U @ C.to(U.dtype)


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOAblate(Variant):
    """Ablated directions, Arditi et al. 2024 (arXiv 2406.11717). Trainable: c [r, k], a [k]."""

    r: int = 256  # singular directions that span the ablated ones, from 1 to min(d_in, d_out)
    k: int = 1  # ablated directions, from 1 to r
    init_alpha: float = 0.05  # the share that is removed at init, above 0 and at most 1
    coeff: float = 1.0  # factor of the removal, any number; may change at inference

    def __post_init__(self):
        check_rank(self)
        check_rank(self, "k")
        check_positive(self, "init_alpha")
        check_number(self, "coeff")
        if self.k > self.r:
            raise LoraFuncError(f"AntiPaSTOAblate(r={self.r}, k={self.k}): k must be at most r")
        if self.init_alpha > 1:
            raise LoraFuncError(f"AntiPaSTOAblate(init_alpha={self.init_alpha!r}): init_alpha must be at most 1")

    @property
    def statistic(self):
        return OutputMoments()

    def init(self, weight, generator, stats=None):
        U, _, _ = top_svd(weight, self.r, "AntiPaSTOAblate")
        if stats is None:
            device = None if generator is None else generator.device
            c = torch.randn(self.r, self.k, generator=generator, device=device) * self.r**-0.5
        else:
            Z = U.mT @ stats.about(0.0 if weight.bias is None else weight.bias).to(U) @ U  # E[z zᵀ]
            c = torch.linalg.eigh(Z).eigenvectors[:, -self.k :].flip(1)
        return Params({"c": c, "a": torch.full((self.k,), self.init_alpha)}, frozen={"U": U})

    def apply(self, x, base_out, weight, params):
        F = directions(params["U"], params["c"])  # [d_out, k]
        z = coordinates(base_out, weight.bias, F)
        return add_along(base_out, z * (-self.coeff * params["a"].clamp(0, 1)).to(z.dtype), F)

    def merged(self, weight, params):
        # (I - c F diag(a) Fᵀ) W
        F = directions(params["U"], params["c"])
        return cored(weight, F, (-self.coeff * params["a"].clamp(0, 1)).diag()), weight.bias
