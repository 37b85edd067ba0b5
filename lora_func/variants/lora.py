"""LoRA: low-rank additive update. Hu et al. 2021, arXiv 2106.09685.

    out = base_out + s (x Aᵀ) Bᵀ          s = alpha / r,  or alpha / sqrt(r) with rslora

A [r, d_in] is drawn Kaiming-uniform, as in the authors' code and PEFT. The paper says Gaussian,
which is `start="gaussian"`, with PEFT's N(0, 1 / r²). (PEFT's "orthogonal" has two factors that
start non-zero: see InitAB.) B [d_out, r] is zero, so the output at init is the base output to the
bit. With `add_bias` it has a trained bias b [d_out], too, which starts at zero: s ((x Aᵀ) Bᵀ + b)
is added. Nothing of the weight is read. The default r is PEFT's; the default alpha is lora-lite's
16 (s = 2), where PEFT has 8 (s = 1). The scale belongs to the fields, not to the parameters: the
same A and B are a different adapter under a different alpha.

rsLoRA (`rslora`): Kalajdzievski 2023, arXiv 2312.03732. LoRA+ (`lr_ratio`): Hayou et al. 2024,
arXiv 2402.12354.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_choice
from ..linalg import at_least_float32, kaiming, low_rank_update, normal, over_rows
from ..variant import Params
from ._low_rank import TwoFactors


@dataclass(frozen=True, kw_only=True)
class LoRA(TwoFactors):
    """Low-rank additive update, Hu et al. 2021 (arXiv 2106.09685).

    Trainable: A [r, d_in], B [d_out, r], and b [d_out] with `add_bias`.
    """

    card = Card(
        title="Low-rank additive update",
        authors="Hu et al. 2021",
        source="2106.09685",
        formula="base_out + s (x Aᵀ) Bᵀ",
        trainable={"A": "r, d_in", "B": "d_out, r", "b": "d_out if add_bias else None"},
        reads="nothing",
        lr=2e-3,
        peft=Peft("LoraConfig"),
        beside_peft="the same; alpha is 16 by default, PEFT's 8",
    )
    broadcasts = rounds_last = True

    start: str = "kaiming"
    """What A is drawn from: "kaiming", U(±1 / sqrt(d_in)), or "gaussian", N(0, 1 / r²)."""
    add_bias: bool = False
    """Train a bias b of B, too. Layers without a bias then cannot be merged."""

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "start", ("kaiming", "gaussian"))
        check_choice(self, "add_bias", (False, True))

    @property
    def lr_scale(self):
        return {"B": self.lr_ratio, "b": self.lr_ratio}

    def init(self, weight, generator, stats=None):
        (d_out, d_in), r = weight.shape, self.r
        gaussian = self.start == "gaussian"
        A = normal((r, d_in), 1 / r, generator) if gaussian else kaiming(r, d_in, generator)
        leaves = {"A": A, "B": torch.zeros(d_out, r, dtype=torch.float32)}
        if self.add_bias:
            leaves["b"] = torch.zeros(d_out, dtype=torch.float32)
        return Params(leaves)

    def prepare(self, weight, params, dtype):
        p = super().prepare(weight, params, dtype)
        return {**p, "b": (self.scale * params["b"]).to(dtype)} if self.add_bias else p

    def apply(self, x, base_out, weight, params):
        p = self.prepared(weight, params, x.dtype)
        return low_rank_update(base_out, x, p["A"], p["B"], self.scale, bias=p.get("b"))

    def fused(self, x, W, b, params):
        out = super().fused(x, W, b, params)
        return out + over_rows(params["b"]) if self.add_bias else out

    def factors(self, weight, params):  # pyright: ignore  (None with a bias)
        return None if self.add_bias else super().factors(weight, params)

    def merged(self, weight, params):
        # W + s B A, bias + s b
        p = {name: at_least_float32(leaf) for name, leaf in params.items()}
        W, bias = at_least_float32(weight.dense()) + self.scale * p["B"] @ p["A"], weight.bias
        if self.add_bias:
            bias = self.scale * p["b"] + (0 if bias is None else bias)
        return W, bias
