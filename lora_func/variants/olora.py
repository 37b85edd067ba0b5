"""OLoRA: LoRA that starts from an orthonormal basis, by QR of the weight. Büyükakyüz 2024, arXiv 2406.01775.

    out = base_out + s x (BA - B0A0)ᵀ,   telescoped as in PiSSA

    W = Q R,   B0 = Q[:, :r] [d_out, r],   A0 = R[:r] [r, d_in],   s = alpha / r

The columns of B0 are orthonormal. The scale is not divided out of the factors, as in PEFT, so what is telescoped away is
s Q_r R_r. The base keeps its weight and the output at init is the base output to the bit. The weight is read once, at init.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..numerics import anchored, anchored_update, anchored_weight, at_least_float32, check_fits
from ..variant import Variant, check_positive, check_rank


@dataclass(frozen=True, kw_only=True)
class OLoRA(Variant):
    """Orthonormal low-rank adaptation, Büyükakyüz 2024 (arXiv 2406.01775). Trainable: A [r, d_in], B [d_out, r]."""

    r: int = 8  # rank, from 1 to min(d_in, d_out)
    alpha: float = 8.0  # scale of the update before the division by r, above 0

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def init(self, weight, generator, stats=None):
        check_fits("OLoRA", self.r, weight.shape)
        Q, R = torch.linalg.qr(at_least_float32(weight.dense()))
        return anchored(R[: self.r], Q[:, : self.r])

    def apply(self, x, base_out, weight, params):
        return anchored_update(base_out, x, params, self.scale)

    def merged(self, weight, params):
        return anchored_weight(weight, params, self.scale), weight.bias
