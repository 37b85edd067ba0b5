"""InitAB: LoRA with both factors random at the start. Li et al. 2025, arXiv 2505.23194.

    out = base_out + s x (BA - B0A0)ᵀ          s = alpha / r,  or alpha / sqrt(r) with rslora

A and B start at the frozen A0 [r, d_in] and B0 [d_out, r], so both have a gradient from the first
step on, and a learning rate that is too low costs less than in LoRA. The output at init is the base
output to the bit. The paper draws both from U(-1, 1) / sqrt(d_in), as LoRA draws A ("kaiming"). It
finds that B0 A0 may also stay in the weight; here it is subtracted, as in the comparison of Lee et
al. 2026, arXiv 2602.04998, where its best learning rate is near LoRA's. Defaults as LoRA.

    "orthogonal":  A0 = Q[0::2]ᵀ X / 10,   B0 = Y Q[1::2] / 10

is PEFT's start of this name, for an orthogonal Q [r, r] and X [r/2, d_in], Y [d_out, r/2] of
N(0, 1). There B0 A0 is zero up to rounding, and PEFT subtracts nothing. The weight is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..checks import check_choice
from ..errors import LoraFuncError
from ..linalg import kaiming, normal, uniform
from ._low_rank import Anchored


@dataclass(frozen=True, kw_only=True)
class InitAB(Anchored):
    """Non-zero initialization of both factors, Li et al. 2025 (arXiv 2505.23194).

    Trainable: A [r, d_in], B [d_out, r].
    """

    card = Card(
        title="Both factors random at the start",
        authors="Li et al. 2025",
        source="2505.23194",
        formula="base_out + s x (BA - B0A0)ᵀ",
        trainable={"A": "r, d_in", "B": "d_out, r"},
        reads="nothing",
        lr=2e-3,
        beside_peft='PEFT has `start="orthogonal"` alone, exact up to rounding',
    )

    r: int = 8
    """Rank, at least 1; even for "orthogonal"."""
    alpha: float | None = 16.0
    """Numerator of the scale s = alpha / r of the update, above 0. None: r."""
    start: str = "kaiming"
    """What A0 and B0 are drawn from: "kaiming", U(±1 / sqrt(d_in)) for both; or "orthogonal",
    PEFT's start of this name, where B0 A0 is zero up to rounding."""

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "start", ("kaiming", "orthogonal"))
        if self.start == "orthogonal" and self.r % 2:
            raise LoraFuncError(f"InitAB(r={self.r}, start='orthogonal'): r must be even there")

    def anchors(self, weight, generator, stats):
        (d_out, d_in), r = weight.shape, self.r
        if self.start == "kaiming":
            return kaiming(r, d_in, generator), uniform((d_out, r), d_in**-0.5, generator)
        Q = torch.linalg.qr(normal((r, r), 1, generator)).Q
        X, Y = (normal(shape, 0.1, generator) for shape in ((r // 2, d_in), (d_out, r // 2)))
        return Q[0::2].mT @ X, Y @ Q[1::2]
