"""MiLoRA: LoRA that starts from the minor singular triplets of the weight. Wang et al. 2024, arXiv 2406.09044.

    out = base_out + s x (BA - B0A0)ᵀ,   telescoped as in PiSSA

    A0 = sqrt(S_- / s) V_- [r, d_in],   B0 = U_- sqrt(S_- / s) [d_out, r],   s B0 A0 = U_- S_- V_-,   s = alpha / r

where U_-, S_-, V_- are the r smallest singular triplets: what pretraining used least is what training may overwrite. Where
the smallest singular values are near zero, so are A0 and B0, and the first gradients are small. The base keeps its weight and
the output at init is the base output to the bit. The weight is read once, at init.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..numerics import anchored, anchored_update, anchored_weight, at_least_float32, check_fits
from ..variant import Variant, check_positive, check_rank


@dataclass(frozen=True, kw_only=True)
class MiLoRA(Variant):
    """Minor singular component adaptation, Wang et al. 2024 (arXiv 2406.09044). Trainable: A [r, d_in], B [d_out, r]."""

    r: int = 8  # rank, from 1 to min(d_in, d_out)
    alpha: float = 8.0  # scale of the update before the division by r, above 0

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def init(self, weight, generator, stats=None):
        check_fits("MiLoRA", self.r, weight.shape)
        U, S, V = torch.linalg.svd(at_least_float32(weight.dense()), full_matrices=False)
        root = (S[-self.r :] / self.scale).sqrt()  # [r]
        return anchored(root[:, None] * V[-self.r :], U[:, -self.r :] * root)

    def apply(self, x, base_out, weight, params):
        return anchored_update(base_out, x, params, self.scale)

    def merged(self, weight, params):
        return anchored_weight(weight, params, self.scale), weight.bias
