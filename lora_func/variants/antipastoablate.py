"""AntiPaSTO-ablate: removes learned directions from the output. The operator is that of
Arditi et al. 2024, arXiv 2406.11717; this form is lora-lite's.

    F = U Ĉ [d_out, k],    out = base_out - c ( ((base_out - b) F) * clamp(a, 0, 1) ) Fᵀ

U [d_out, r] is an orthonormal basis: the top left singular vectors of W, or with calibration the
uncentred principal components of the layer's outputs (lora-lite's `cov_orient`). Ĉ [r, k] is an
orthonormal form of the learned c: c / |c| for k = 1, otherwise the Q of its QR. For coeff and a in
[0, 1] the map contracts; a = 1 removes the directions entirely. The bias is not ablated.

With a = 0 the direction could not learn, so a starts at `init_alpha` and the output at init is NOT
the base output: it lacks that share of k directions. c starts at random. lora-lite also tried to
start c at the top component of the outputs and took it back: on GSM8K it was no better (one seed).
The clamp has no gradient outside [0, 1]: bring a back inside after a step that left it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..checks import check_fits, check_number, check_positive, check_rank
from ..errors import LoraFuncError
from ..linalg import at_least_float32, full_precision, top_svd
from ..statistics import OutputMoments
from ..variant import Params
from ._directions import Directions


@full_precision
def directions(U, c):
    """F [d_out, k], in the dtype of U. (lora-lite's |c| + 1e-6 would leave 1e-6 of F behind.)"""
    c = at_least_float32(c)
    C = c / c.norm().clamp(min=1e-6) if c.shape[-1] == 1 else torch.linalg.qr(c).Q
    return U @ C.to(U.dtype)


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOAblate(Directions):
    """Ablated directions, Arditi et al. 2024 (arXiv 2406.11717).

    Trainable: c [r, k], a [k].
    """

    card = Card(
        title="Ablated directions",
        authors="Arditi et al. 2024",
        source="2406.11717",
        formula="base_out - c (((base_out - b) F) a) Fᵀ",
        trainable={"c": "r, k", "a": "k"},
        at_init="moved",
        reads="init",
        data="optional",
        lr=0.1,
        width=8,
        beside_peft="not in PEFT",
    )

    r: int = 256
    """Number of directions whose span holds the ablated ones, from 1 to min(d_in, d_out)."""
    k: int = 1
    """Number of ablated directions, from 1 to r."""
    init_alpha: float = 0.05
    """The share of the ablated directions that is removed at init: where a starts. Above 0 and at
    most 1."""
    coeff: float = 1.0
    """c, factor of the removal: any number. It may change at inference; 0 is the base."""

    def __post_init__(self):
        check_rank(self)
        check_rank(self, "k")
        check_positive(self, "init_alpha")
        check_number(self, "coeff")
        if self.k > self.r:
            raise LoraFuncError(f"AntiPaSTOAblate(r={self.r}, k={self.k}): k must be at most r")
        if self.init_alpha > 1:
            raise LoraFuncError(
                f"AntiPaSTOAblate(init_alpha={self.init_alpha!r}): init_alpha must be at most 1"
            )

    @property
    def statistic(self):
        return OutputMoments()

    def init(self, weight, generator, stats=None):
        check_fits(self, weight.shape)
        if stats is None:
            U, _, _ = top_svd(weight.dense(), self.r)
        else:
            moment = stats.about(0.0 if weight.bias is None else weight.bias.to(stats.mean))
            U = torch.linalg.eigh(moment).eigenvectors[:, -self.r :].flip(1).to(weight.device)
        device = None if generator is None else generator.device
        c = torch.randn(self.r, self.k, generator=generator, device=device, dtype=torch.float32)
        a = torch.full((self.k,), self.init_alpha, dtype=torch.float32)
        return Params({"c": c * self.r**-0.5, "a": a}, frozen={"U": U})

    def core(self, params):
        return {
            "U": directions(params["U"], params["c"]),
            "gain": -self.coeff * params["a"].clamp(0, 1),
        }
