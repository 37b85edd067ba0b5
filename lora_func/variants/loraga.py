"""LoRA-GA: LoRA whose first step follows the full gradient. Wang et al. 2024, arXiv 2407.05000.

    out = base_out + s x (BA - B0A0)ᵀ          s = alpha / r,  or alpha / sqrt(r) with rslora

    G = dL/dW,   U S V = svd(G),   A0 = V[a] [r, d_in],   B0 = U[:, b] S[b] c [d_out, r]

    direction    a, b: which of the first 2r triplets    start_scale  c
    "ArB2r"      the first r, the second r               "stable"      d_out^(1/4) / sqrt(gamma)
    "A2rBr"      the second r, the first r               "weight_svd"  largest of W / of S[b]
    "ArBr"       every second, from the second, first    "gd_scale"    1 / s, and so for A0
    "random"     the same r, drawn                       "unit"        1

By default A0 and B0 take different triplets of the gradient, so the first update of BA spans 2r of
its directions. All this is PEFT's, including the S in B0; the paper scales both factors and leaves
S out. G is summed from inputs and output gradients during calibration and divided by the number of
batches. No weight needs `requires_grad`, and quantized layers work. The output at init is the base
output to the bit. The weight is read by "weight_svd" alone, once, at init.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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
        reads="init",
        data="required",
        lr=3e-3,
        peft=Peft("LoraConfig", {"init_lora_weights": "lora_ga"}),
        beside_peft="the same factors from the same gradient; PEFT makes the weights require grad",
    )

    r: int = 8
    """Rank, from 1 to half of min(d_in, d_out): two times r triplets of the gradient are read."""
    alpha: float | None = 16.0
    """Numerator of the scale s = alpha / r of the update, above 0. None: r."""
    direction: str = "ArB2r"
    """Which triplets of the gradient A0 and B0 take: "ArB2r", "A2rBr", "ArBr" or "random", as in
    the table above."""
    start_scale: str = "stable"
    """The factor c of B0: "stable", "weight_svd", "gd_scale" or "unit", as in that table."""
    gamma: float = 16.0
    """Of "stable": the larger, the smaller B0; above 0. Unused by the others."""
    svd: str = "exact"
    """How the gradient is decomposed: "exact", or "randomized", which is much faster for a small r
    on a large layer."""
    niter: int = 4
    """Power iterations of the randomized SVD, at least 1; unused by the exact one."""

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "direction", ("ArB2r", "A2rBr", "ArBr", "random"))
        check_choice(self, "start_scale", ("stable", "weight_svd", "gd_scale", "unit"))
        check_positive(self, "gamma")
        check_choice(self, "svd", ("exact", "randomized"))
        check_rank(self, "niter")

    @property
    def statistic(self):
        return MeanGradient()

    def anchors(self, weight, generator, stats):
        if stats is None:
            raise needs_data(self, "the gradient on a few batches with labels")
        check_fits(self, weight.shape, limit=min(weight.shape) // 2)
        niter = self.niter if self.svd == "randomized" else None
        U, S, V = top_svd(stats, 2 * self.r, niter, generator)
        a, b = self.triplets(generator)
        A0, B0, largest = V[a], U[:, b] * S[b], S[b][0]
        if self.start_scale == "stable":
            B0 = B0 * (weight.shape[0] ** 0.25 / self.gamma**0.5)
        elif self.start_scale == "weight_svd":
            norm = top_svd(weight.dense(), 1, niter, generator)[1].to(S)
            B0 = B0 * torch.where(largest > 0, norm / largest, 1.0)  # 0: a layer without gradient
        elif self.start_scale == "gd_scale":
            A0, B0 = A0 / self.scale, B0 / self.scale
        return A0.clone(), B0

    def triplets(self, generator: torch.Generator | None) -> tuple[Any, Any]:
        """a and b: which of the 2r triplets are those of A0, and which those of B0."""
        first, second = slice(0, self.r), slice(self.r, 2 * self.r)
        if self.direction == "random":
            device = None if generator is None else generator.device
            drawn = torch.randperm(2 * self.r, generator=generator, device=device)
            first = second = drawn[first].sort().values
        elif self.direction == "A2rBr":
            first, second = second, first
        elif self.direction == "ArBr":
            first, second = slice(1, None, 2), slice(0, None, 2)
        return first, second
