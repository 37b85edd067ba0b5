"""Families of variants that update the weight by a low-rank product."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_positive, check_rank
from ..fused import low_rank_linear
from ..linalg import at_least_float32, low_rank_difference, low_rank_update
from ..variant import Params, Variant, Weight


@dataclass(frozen=True, kw_only=True)
class Factored(Variant):
    """`W_eff = W + B A`, with the A and B that `factors` makes of the parameters."""

    @abc.abstractmethod
    def factors(self, weight: Weight, params: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """See `Variant.factors`."""

    def merged(self, weight, params):
        # W + B A
        A, B = self.factors(weight, params)  # pyright: ignore  (not None here)
        return at_least_float32(weight.dense()) + B @ A, weight.bias


@dataclass(frozen=True, kw_only=True)
class Product(Factored):
    """`out = base_out + s (x Aᵀ) Bᵀ`, with the A and B that `pair` makes of the parameters."""

    broadcasts = rounds_last = True

    @property
    def scale(self) -> float:
        """s."""
        return 1.0

    def pair(self, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`A [r, d_in]` and `B [d_out, r]`, in the dtype of the parameters."""
        return params["A"], params["B"]

    def prepare(self, weight, params, dtype):
        A, B = self.pair(params)
        return {"A": A.to(dtype), "B": B.to(dtype)}

    def apply(self, x, base_out, weight, params):
        p = self.prepared(weight, params, x.dtype)
        return low_rank_update(base_out, x, p["A"], p["B"], self.scale)

    def fused(self, x, W, b, params):
        return low_rank_linear(x, W, b, params["A"], params["B"], self.scale)

    def factors(self, weight, params):
        A, B = (at_least_float32(factor) for factor in self.pair(params))
        return A, self.scale * B


def scale_of(alpha: float, r: int, rslora: bool) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` with rslora (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / (math.sqrt(r) if rslora else r)


@dataclass(frozen=True, kw_only=True)
class LowRank(Variant):
    """LoRA's hyperparameters, and its scale s."""

    r: int = 8
    """Rank, at least 1."""
    alpha: float = 16.0
    """Numerator of the scale s = alpha / r of the update, above 0."""
    rslora: bool = False
    """Divide alpha by sqrt(r) instead of r (rsLoRA, arXiv 2312.03732)."""

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")
        check_choice(self, "rslora", (False, True))

    @property
    def scale(self) -> float:
        """s."""
        return scale_of(self.alpha, self.r, self.rslora)


@dataclass(frozen=True, kw_only=True)
class TwoFactors(LowRank, Product):
    """LoRA's two factors, which may learn at two rates."""

    lr_ratio: float = 1.0
    """B learns this many times faster than A: above 0. 1 is LoRA; LoRA+ (arXiv 2402.12354) suggests
    16. Read by `Adapter.lr_scale`."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "lr_ratio")

    @property
    def lr_scale(self):
        return {"B": self.lr_ratio}


@dataclass(frozen=True, kw_only=True)
class Anchored(Product):
    """`out = base_out + s x (BA - B0A0)ᵀ`: A and B start at the frozen anchors A0 and B0.

    The difference is telescoped, s [(x Aᵀ)(B - B0)ᵀ + (x (A - A0)ᵀ) B0ᵀ]. At init each term has a
    factor that is exactly zero, so the output is the base output to the bit and the base keeps
    its weight. A subclass says what the anchors are. They belong in the file: the signs of
    singular vectors differ between machines.
    """

    prepares_together = True

    r: int = 8
    """Rank, from 1 to min(d_in, d_out)."""
    alpha: float | None = None
    """Numerator of the scale s = alpha / r of the update, above 0. None: r, so that s = 1 without
    rslora."""
    rslora: bool = False
    """Divide alpha by sqrt(r) instead of r (rsLoRA, arXiv 2312.03732)."""

    def __post_init__(self):
        check_rank(self)
        if self.alpha is not None:
            check_positive(self, "alpha")
        check_choice(self, "rslora", (False, True))

    @property
    def scale(self) -> float:
        return scale_of(self.r if self.alpha is None else self.alpha, self.r, self.rslora)

    @abc.abstractmethod
    def anchors(
        self, weight: Weight, generator: torch.Generator | None, stats: Any
    ) -> tuple[Tensor, Tensor]:
        """`A0 [r, d_in]` and `B0 [d_out, r]` for one layer."""

    def init(self, weight, generator, stats=None):
        A0, B0 = self.anchors(weight, generator, stats)
        return Params({"A": A0.clone(), "B": B0.clone()}, frozen={"A0": A0, "B0": B0})

    def like(self, weight, leaves):
        d_out, d_in = weight.shape
        A = torch.empty(self.r, d_in, dtype=torch.float32)
        B = torch.empty(d_out, self.r, dtype=torch.float32)
        return Params({"A": A, "B": B}, frozen={"A0": A, "B0": B})

    def pair(self, params):
        return low_rank_difference(params["A"], params["B"], params["A0"], params["B0"])
