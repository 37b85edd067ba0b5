"""LoRA: low-rank additive update. Hu et al. 2021, arXiv 2106.09685. rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.
LoRA+: Hayou et al. 2024, arXiv 2402.12354.

    out = base_out + s (x Aᵀ) Bᵀ          s = alpha / r,  or alpha / sqrt(r) with rslora

A [r, d_in] is drawn Kaiming-uniform, as in the authors' code and PEFT (the paper's text says Gaussian); B [d_out, r] is
zero, so the output at init is the base output to the bit. Of the weight it reads nothing. The default r is PEFT's; alpha
is lora-lite's 16 (s = 2), where PEFT has 8 (s = 1). The scale belongs to the fields, not to the parameters, so the same A
and B mean another adapter under another alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..numerics import at_least_float32, kaiming, low_rank_update
from ..variant import Params, Variant, check_choice, check_positive, check_rank


@dataclass(frozen=True, kw_only=True)
class LoRA(Variant):
    """Low-rank additive update, Hu et al. 2021 (arXiv 2106.09685). Trainable: A [r, d_in], B [d_out, r]."""

    r: int = 8  # rank, at least 1
    alpha: float = 16.0  # scale of the update before the division by r, above 0
    rslora: bool = False  # divide alpha by sqrt(r) instead of r
    lr_ratio: float = 1.0  # B learns so many times faster than A (LoRA+, whose authors suggest 16); above 0

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")
        check_choice(self, "rslora", (False, True))
        check_positive(self, "lr_ratio")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def lr_scale(self):
        return {"B": self.lr_ratio}

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        return Params({"A": kaiming(self.r, d_in, generator), "B": torch.zeros(d_out, self.r)})

    def apply(self, x, base_out, weight, params):
        return low_rank_update(base_out, x, params["A"], params["B"], self.scale)

    def merged(self, weight, params):
        # W + s B A
        return at_least_float32(weight.dense()) + self.scale * params["B"] @ params["A"], weight.bias
