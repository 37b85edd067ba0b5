"""LoRA: low-rank additive update. Hu et al. 2021, arXiv 2106.09685.

    out = base_out + s (x Aᵀ) Bᵀ          s = alpha / r,  or alpha / sqrt(r) with rslora

A [r, d_in] is drawn Kaiming-uniform, as in the authors' code and PEFT (the paper says Gaussian).
B [d_out, r] is zero, so the output at init is the base output to the bit. Nothing of the weight is
read. The default r is PEFT's; the default alpha is lora-lite's 16 (s = 2), where PEFT has 8
(s = 1). The scale belongs to the fields, not to the parameters: the same A and B are a different
adapter under a different alpha.

rsLoRA (`rslora`): Kalajdzievski 2023, arXiv 2312.03732. LoRA+ (`lr_ratio`): Hayou et al. 2024,
arXiv 2402.12354.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_positive
from ..linalg import kaiming
from ..variant import Params
from ._low_rank import LowRank, Product


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank, Product):
    """Low-rank additive update, Hu et al. 2021 (arXiv 2106.09685).

    Trainable: A [r, d_in], B [d_out, r].
    """

    card = Card(
        title="Low-rank additive update",
        authors="Hu et al. 2021",
        source="2106.09685",
        formula="base_out + s (x Aᵀ) Bᵀ",
        trainable={"A": "r, d_in", "B": "d_out, r"},
        reads="nothing",
        lr=2e-3,
        peft=Peft("LoraConfig"),
        beside_peft="the same; alpha is 16 by default, PEFT's 8",
    )

    lr_ratio: float = 1.0  # B learns this many times faster than A (LoRA+ suggests 16); above 0

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "lr_ratio")

    @property
    def lr_scale(self):
        return {"B": self.lr_ratio}

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        B = torch.zeros(d_out, self.r, dtype=torch.float32)
        return Params({"A": kaiming(self.r, d_in, generator), "B": B})
