"""PiSSA: LoRA that starts from the principal singular triplets. Meng et al. 2024, arXiv 2404.02948.

    out = base_out + s x (BA - B0A0)ᵀ          s = alpha / r,  or alpha / sqrt(r) with rslora

    A0 = sqrt(S_r / s) V_r [r, d_in],   B0 = U_r sqrt(S_r / s) [d_out, r],   s B0 A0 = U_r S_r V_r

A and B start at the frozen A0 and B0. The paper subtracts s B0 A0 from the weight, which starts
6e-3 off in bfloat16; here the base keeps its weight and the output at init is the base output to
the bit, on quantized bases too. (QPiSSA, which quantizes the residual, is another method.) The
weight is read once, at init, for its SVD.

The product s B0 A0 does not depend on alpha. Training does: the first step of SGD moves the
output s times as far as for s = 1, and that of Adam sqrt(s) times. alpha = None means r, as in the
authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..card import Card, Peft
from ..checks import check_choice, check_fits, check_rank
from ..linalg import top_svd
from ._low_rank import Anchored


@dataclass(frozen=True, kw_only=True)
class PiSSA(Anchored):
    """Principal singular values adaptation, Meng et al. 2024 (arXiv 2404.02948).

    Trainable: A [r, d_in], B [d_out, r].
    """

    card = Card(
        title="Principal singular values adaptation",
        authors="Meng et al. 2024",
        source="2404.02948",
        formula="base_out + s x (BA - B0A0)ᵀ",
        trainable={"A": "r, d_in", "B": "d_out, r"},
        reads="init",
        lr=3e-3,
        peft=Peft("LoraConfig", {"init_lora_weights": "pissa"}),
        beside_peft="the same function; PEFT rewrites the weight, 6e-3 off in bfloat16",
    )

    svd: str = "exact"
    """How the weight is decomposed: "exact", or "randomized", which is much faster for a small r on
    a large layer."""
    niter: int = 4
    """Power iterations of the randomized SVD, at least 1; unused by the exact one."""

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "svd", ("exact", "randomized"))
        check_rank(self, "niter")

    def anchors(self, weight, generator, stats):
        check_fits(self, weight.shape)
        niter = self.niter if self.svd == "randomized" else None
        U, S, V = top_svd(weight.dense(), self.r, niter, generator)
        root = (S / self.scale).sqrt()  # [r]
        return root[:, None] * V, U * root
