"""OLoRA: LoRA that starts from a QR decomposition of the weight. Büyükakyüz 2024, arXiv 2406.01775.

    out = base_out + s x (BA - B0A0)ᵀ          s = alpha / r,  or alpha / sqrt(r) with rslora

    W = Q R,   B0 = Q[:, :r] [d_out, r],   A0 = R[:r] [r, d_in]

The columns of B0 are orthonormal. As in PEFT the scale is not divided out of the factors, so the
start is s Q_r R_r. The output at init is the base output to the bit. The weight is read once, at
init.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_fits
from ..linalg import at_least_float32
from ._low_rank import Anchored


@dataclass(frozen=True, kw_only=True)
class OLoRA(Anchored):
    """Orthonormal low-rank adaptation, Büyükakyüz 2024 (arXiv 2406.01775).

    Trainable: A [r, d_in], B [d_out, r].
    """

    card = Card(
        title="Orthonormal low-rank adaptation",
        authors="Büyükakyüz 2024",
        source="2406.01775",
        formula="base_out + s x (BA - B0A0)ᵀ",
        trainable={"A": "r, d_in", "B": "d_out, r"},
        reads="init",
        lr=3e-3,
        peft=Peft("LoraConfig", {"init_lora_weights": "olora"}),
        beside_peft="the same function; PEFT rewrites the weight",
    )

    def anchors(self, weight, generator, stats):
        check_fits(self, weight.shape)
        W = at_least_float32(weight.dense())
        Q, R = torch.linalg.qr(W[:, : self.r])  # [d_out, r], [r, r]: no later column changes them
        return torch.cat([R, Q.mT @ W[:, self.r :]], dim=1), Q
