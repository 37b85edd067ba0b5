"""LoRA-GA: LoRA whose first step follows the full gradient. Wang et al. 2024, arXiv 2407.05000.

    out = base_out + s x (BA - B0A0)ᵀ          s = alpha / r,  or alpha / sqrt(r) with rslora

    G = dL/dW,   U S V = svd(G),   A0 = V[:r],   B0 = U[:, r:2r] S[r:2r] d_out^(1/4) / sqrt(gamma)

A0 and B0 take different triplets of the gradient, so the first update of BA spans 2r of its
directions. This is PEFT's "ArB2r" with scale "stable", including the S in B0; the paper scales
both factors and leaves S out. G is summed from inputs and output gradients during calibration and
divided by the number of batches, so B0 does not grow with the data. No weight needs
`requires_grad`, and quantized layers work. The output at init is the base output to the bit. The
weight itself is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..card import Card, Peft
from ..checks import check_choice, check_fits, check_positive, check_rank, needs_data
from ..linalg import top_svd
from ..statistics import OutputGradients
from ._low_rank import Anchored


@dataclass(frozen=True, kw_only=True)
class MeanGradient(OutputGradients):
    """`OutputGradients` divided by the number of times the layer was called."""

    def update(self, state: Any, tokens: Any) -> Any:
        calls, G = (0, None) if state is None else state
        return calls + 1, super().update(G, tokens)

    def finalize(self, states):
        return {path: state[1] / state[0] for path, state in states.items() if state is not None}


@dataclass(frozen=True, kw_only=True)
class LoRAGA(Anchored):
    """LoRA with gradient approximation, Wang et al. 2024 (arXiv 2407.05000).

    Trainable: A [r, d_in], B [d_out, r].
    """

    card = Card(
        title="LoRA with gradient approximation",
        authors="Wang et al. 2024",
        source="2407.05000",
        formula="base_out + s x (BA - B0A0)ᵀ",
        trainable={"A": "r, d_in", "B": "d_out, r"},
        reads="nothing",
        data="required",
        lr=5e-4,
        peft=Peft("LoraConfig", {"init_lora_weights": "lora_ga"}),
        beside_peft="the same factors from the same gradient; PEFT makes the weights require grad",
    )

    r: int = 8  # rank, from 1 to half of min(d_in, d_out)
    alpha: float | None = 16.0  # scale before the division by r, above 0; None: r
    gamma: float = 16.0  # the larger, the smaller B0; above 0
    svd: str = "exact"  # or "randomized"
    niter: int = 4  # power iterations of the randomized one, at least 1

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "gamma")
        check_choice(self, "svd", ("exact", "randomized"))
        check_rank(self, "niter")

    @property
    def statistic(self):
        return MeanGradient()

    def anchors(self, weight, generator, stats):
        if stats is None:
            raise needs_data(self, "the gradient on a few batches with labels")
        r, (d_out, _) = self.r, weight.shape
        check_fits(self, weight.shape, limit=min(weight.shape) // 2)
        niter = self.niter if self.svd == "randomized" else None
        U, S, V = top_svd(stats, 2 * r, niter, generator)
        return V[:r].clone(), U[:, r:] * S[r:] * (d_out**0.25 / self.gamma**0.5)
