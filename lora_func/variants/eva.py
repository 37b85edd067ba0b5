"""EVA: LoRA that starts from the principal components of its inputs, with a rank for each layer.
Paischer et al. 2024, arXiv 2410.07170.

    out = base_out + s (x Aᵀ) Bᵀ                                s = alpha / r, whatever the rank r_l

A [r_l, d_in] holds the first r_l principal directions of the layer's calibration inputs; B is
zero, so the output at init is the base output to the bit. A layer offers up to round(rho r)
components. Of all that are offered, the r x (number of layers) with the largest share of their
layer's variance are taken, and r_l counts those of layer l. With rho = 1 all ranks are r. A layer
from which none is taken gets no adapter. The scale alpha / r is what PEFT's adjusted
alpha_l = alpha r_l / r comes to. With rslora it is alpha / sqrt(r) in every layer; PEFT multiplies
that by sqrt(r_l / r), which is 1 where the rank is r.

The components are exact: moments are summed over all tokens and decomposed once. PEFT updates a
truncated SVD with each batch until it changes little. On one batch both agree; on many PEFT's is an
approximation, also at a tight tolerance. `center=False` takes the uncentred second moment, whose
first direction is mostly the mean (as in lora-lite). The weight itself is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_choice, check_positive, needs_data
from ..errors import LoraFuncError
from ..statistics import PrincipalComponents
from ..variant import Params
from ._low_rank import TwoFactors


@dataclass(frozen=True, kw_only=True)
class EVA(TwoFactors):
    """Explained-variance adaptation, Paischer et al. 2024 (arXiv 2410.07170).

    Trainable: A [r_l, d_in], B [d_out, r_l].
    """

    card = Card(
        title="Explained-variance adaptation",
        authors="Paischer et al. 2024",
        source="2410.07170",
        formula="base_out + s (x Aᵀ) Bᵀ",
        trainable={"A": "r_l, d_in", "B": "d_out, r_l"},
        reads="nothing",
        data="required",
        lr=2e-3,
        peft=Peft("LoraConfig", {"init_lora_weights": "eva"}),
        beside_peft="exact components; PEFT's incremental SVD agrees on one batch",
    )

    rho: float = 2.0
    """At least 1: a layer's rank is at most round(rho r). 1 gives every layer the rank r."""
    center: bool = True
    """Take the components of the covariance. False: of the uncentred second moment."""
    whiten: bool = False
    """Divide each direction by the root of its singular value, as PEFT's option of this name."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "rho")
        if self.rho < 1:
            raise LoraFuncError(f"EVA(rho={self.rho!r}): rho must be at least 1")
        check_choice(self, "center", (False, True))
        check_choice(self, "whiten", (False, True))

    @property
    def statistic(self):
        return PrincipalComponents(r=self.r, rho=self.rho, center=self.center)

    def init(self, weight, generator, stats=None):
        if stats is None:
            raise needs_data(self, "the principal components of its inputs")
        A, singular_values = stats
        if not len(A):
            return Params({})
        if self.whiten:
            A = A / singular_values.sqrt()[:, None]
        return Params({"A": A.clone(), "B": A.new_zeros(weight.shape[0], len(A))})

    def like(self, weight, leaves):
        d_out, d_in = weight.shape
        r = len(leaves["A"]) if "A" in leaves else self.r
        return Params({"A": torch.empty(r, d_in), "B": torch.empty(d_out, r)})
