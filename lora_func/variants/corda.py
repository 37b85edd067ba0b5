"""CorDA: LoRA that starts from a data-oriented decomposition. Yang et al. 2024, arXiv 2406.05223.

    out = base_out + s x (BA - B0A0)ᵀ          s = alpha / r,  or alpha / sqrt(r) with rslora

    C = E[x xᵀ] + 0.01 mean(diag) I,   U S V = svd(W C)
    A0 = sqrt(S_r / s) V_r C⁻¹ [r, d_in],   B0 = U_r sqrt(S_r / s) [d_out, r]

C is the uncentred second moment of the calibration inputs. Mode "ipm" (instruction-previewed)
takes the r largest triplets, which carry the data. Mode "kpm" (knowledge-preserved) takes the r
smallest: training spares what the data uses. The damping of 1 % is PEFT's first try. PEFT
estimates C in another way (it divides each batch by its largest entry); this file follows the
paper. The output at init is the base output to the bit. The weight is read once, at init. How
training depends on alpha: see PiSSA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_choice, check_fits, check_rank, needs_data
from ..linalg import top_svd
from ..statistics import InputMoments
from ._low_rank import Anchored

DAMPING = 0.01


@dataclass(frozen=True, kw_only=True)
class CorDA(Anchored):
    """Context-oriented decomposition, Yang et al. 2024 (arXiv 2406.05223).

    Trainable: A [r, d_in], B [d_out, r].
    """

    card = Card(
        title="Context-oriented decomposition",
        authors="Yang et al. 2024",
        source="2406.05223",
        formula="base_out + s x (BA - B0A0)ᵀ",
        trainable={"A": "r, d_in", "B": "d_out, r"},
        reads="init",
        data="required",
        lr=3e-3,
        peft=Peft("LoraConfig", {"init_lora_weights": "corda"}),
        beside_peft="the paper's covariance; PEFT divides each batch by its largest entry first",
    )

    mode: str = "ipm"
    """Which triplets of W C are taken: "ipm" (instruction-previewed), the r largest, which carry
    the data; "kpm" (knowledge-preserved), the r smallest."""
    svd: str = "exact"
    """How W C is decomposed: "exact", or "randomized" for "ipm", which is much faster for a small r
    on a large layer."""
    niter: int = 4
    """Power iterations of the randomized SVD, at least 1; unused by the exact one."""

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "mode", ("ipm", "kpm"))
        check_choice(self, "svd", ("exact", "randomized") if self.mode == "ipm" else ("exact",))
        check_rank(self, "niter")

    @property
    def statistic(self):
        return InputMoments()

    def anchors(self, weight, generator, stats):
        if stats is None:
            raise needs_data(self, "the second moment of its inputs")
        check_fits(self, weight.shape)
        C = stats.about(0).double()  # float64, because its inverse undoes it
        C = C + DAMPING * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
        most = len(C) if self.mode == "kpm" else self.r
        niter = self.niter if self.svd == "randomized" else None
        U, S, V = top_svd(weight.dense().double() @ C, most, niter, generator)
        part = slice(0, self.r) if self.mode == "ipm" else slice(-self.r, None)
        root = (S[part] / self.scale).sqrt()  # [r]
        A0 = torch.linalg.solve(C, V[part], left=False) * root[:, None]  # V C⁻¹
        return A0.to(stats.mean.dtype), (U[:, part] * root).to(stats.mean.dtype)
