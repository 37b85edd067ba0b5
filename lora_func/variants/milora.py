"""MiLoRA: LoRA that starts from the minor singular triplets. Wang et al. 2024, arXiv 2406.09044.

    out = base_out + s x (BA - B0A0)ᵀ          s = alpha / r,  or alpha / sqrt(r) with rslora

    A0 = sqrt(S_- / s) V_- [r, d_in],   B0 = U_- sqrt(S_- / s) [d_out, r],   s B0 A0 = U_- S_- V_-

U_-, S_-, V_- are the r smallest singular triplets: training overwrites first what pretraining used
least. If the smallest singular values are near zero, so are A0 and B0, and the first gradients are
small. The output at init is the base output to the bit. The weight is read once, at init. How
training depends on alpha: see PiSSA.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..card import Card
from ..checks import check_fits
from ..linalg import top_svd
from ._low_rank import Anchored


@dataclass(frozen=True, kw_only=True)
class MiLoRA(Anchored):
    """Minor singular component adaptation, Wang et al. 2024 (arXiv 2406.09044).

    Trainable: A [r, d_in], B [d_out, r].
    """

    card = Card(
        title="Minor singular component adaptation",
        authors="Wang et al. 2024",
        source="2406.09044",
        formula="base_out + s x (BA - B0A0)ᵀ",
        trainable={"A": "r, d_in", "B": "d_out, r"},
        reads="init",
        lr=0.01,
        beside_peft="not in PEFT",
    )

    def anchors(self, weight, generator, stats):
        check_fits(self, weight.shape)
        U, S, V = top_svd(weight.dense(), min(weight.shape))
        root = (S[-self.r :] / self.scale).sqrt()  # [r]
        return root[:, None] * V[-self.r :], U[:, -self.r :] * root
