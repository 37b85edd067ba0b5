"""CorDA: LoRA that starts from a decomposition oriented by the covariance of the inputs. Yang et al. 2024, arXiv 2406.05223.

    out = base_out + s x (BA - B0A0)ᵀ,   telescoped as in PiSSA

    C = E[x xᵀ] + damping mean(diag) I,   U S V = svd(W C),   A0 = sqrt(S_r / s) V_r C⁻¹,   B0 = U_r sqrt(S_r / s)

C is the uncentred second moment of the calibration tokens. Mode "ipm" (instruction previewed) takes the r largest triplets,
which carry the data; "kpm" (knowledge preserved) the r smallest, so that training spares what the data uses. The damping of
1 % is PEFT's first. PEFT estimates C otherwise (it divides each batch by its largest entry); the paper's formula stands here.
The output at init is the base output to the bit. The weight is read once, at init.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..calibrate import InputMoments
from ..numerics import anchored, anchored_update, anchored_weight, check_fits, needs_data
from ..variant import Variant, check_choice, check_positive, check_rank

DAMPING = 0.01


@dataclass(frozen=True, kw_only=True)
class CorDA(Variant):
    """Context-oriented decomposition, Yang et al. 2024 (arXiv 2406.05223). Trainable: A [r, d_in], B [d_out, r]."""

    r: int = 8  # rank, from 1 to min(d_in, d_out)
    alpha: float = 8.0  # scale of the update before the division by r, above 0
    mode: str = "ipm"  # "ipm": the largest triplets; "kpm": the smallest

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")
        check_choice(self, "mode", ("ipm", "kpm"))

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    @property
    def statistic(self):
        return InputMoments()

    def init(self, weight, generator, stats=None):
        if stats is None:
            raise needs_data(self, "the second moment of its inputs, by 16 batches or so")
        check_fits("CorDA", self.r, weight.shape)
        C = stats.about(0).double()  # its inverse undoes it: in float32 that would cost digits
        C = C + DAMPING * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
        U, S, V = torch.linalg.svd(weight.dense().double() @ C, full_matrices=False)
        part = slice(0, self.r) if self.mode == "ipm" else slice(-self.r, None)
        root = (S[part] / self.scale).sqrt()  # [r]
        A0 = torch.linalg.solve(C, V[part], left=False) * root[:, None]  # V C⁻¹
        return anchored(A0.to(stats.mean.dtype), (U[:, part] * root).to(stats.mean.dtype))

    def like(self, weight, leaves):
        d_out, d_in = weight.shape
        return anchored(torch.empty(self.r, d_in), torch.empty(d_out, self.r))

    def apply(self, x, base_out, weight, params):
        return anchored_update(base_out, x, params, self.scale)

    def merged(self, weight, params):
        return anchored_weight(weight, params, self.scale), weight.bias
