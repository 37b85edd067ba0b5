"""One entry per variant: what the laws need to know of it. A law never asks for a name; what differs is declared here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import lora_func as lf
from lora_func.variant import Variant, Weight


@dataclass(frozen=True)
class Case:
    make: Callable[..., Variant]  # hyperparameters -> variant
    count: Callable[[int, int, int], int]  # (r, d_out, d_in) -> number of trainable parameters
    ranks: Callable[[int, int], st.SearchStrategy[int] | None] = lambda d_out, d_in: st.integers(1, 12)  # None: it has no r
    identity: Callable[[Variant, torch.dtype], float] = lambda variant, dtype: 0.0  # relative error at init; 0: to the bit
    reads: str = "nothing"  # of the weight: "nothing", "init" (dense, once), "rows" (a few rows through it on each call)
    noise: float = 0.3  # trained parameters are the initial ones plus this times N(0, 1)
    derivative: bool = True  # whether autograd returns the derivative of the function
    condition: Callable[[Layer], float] = lambda layer: 1.0  # by how much the formula itself amplifies rounding


def rank_one(d_out: int, d_in: int) -> st.SearchStrategy[int]:
    return st.integers(1, min(d_out, d_in, 12))


def even(d_out: int, d_in: int) -> st.SearchStrategy[int]:
    return st.integers(1, 6).map(lambda pairs: 2 * pairs)


def none(d_out: int, d_in: int) -> None:
    return None


def householder_error(variant: Variant, dtype: torch.dtype) -> float:
    return 8 * torch.finfo(dtype).eps * variant.r


def cancellation(layer: Layer) -> float:
    """DoRA divides by the norms of the rows of W + s BA, which are short where the two terms cancel."""
    A, B = layer.trained["A"].double(), layer.trained["B"].double()
    W, s = layer.weight.matrix.double(), layer.variant.scale
    terms = W.abs() + s * B.abs() @ A.abs()
    return (terms.norm(dim=1) / (W + s * B @ A).norm(dim=1)).square().max().item()


def low_rank(r: int, d_out: int, d_in: int) -> int:
    return r * (d_out + d_in)


CASES = {
    "lora": Case(lf.LoRA, low_rank),
    "lora-rs": Case(lambda r: lf.LoRA(r=r, rslora=True, alpha=4.0), low_rank),
    "pissa": Case(lf.PiSSA, low_rank, rank_one, reads="init"),
    "dora": Case(lf.DoRA, lambda r, o, i: r * (o + i) + o, reads="rows", derivative=False, condition=cancellation),
    "dora-full": Case(
        lambda r: lf.DoRA(r=r, detach_norm=False), lambda r, o, i: r * (o + i) + o, reads="rows", condition=cancellation
    ),
    "delora": Case(lf.DeLoRA, lambda r, o, i: r * (o + i) + 1, reads="init"),
    "delora-paper": Case(lambda r: lf.DeLoRA(r=r, lambda0=2.0, init="paper"), lambda r, o, i: r * (o + i) + 1, reads="init"),
    "ia3": Case(lf.IA3, lambda r, o, i: o, none),
    "ia3ff": Case(lf.IA3FF, lambda r, o, i: i, none),
    "hra": Case(lf.HRA, lambda r, o, i: r * i, even, identity=householder_error),
}


@dataclass(frozen=True)
class Layer:
    """A linear layer with an adapter, drawn by hypothesis."""

    variant: Variant
    weight: Weight
    x: Tensor  # [*lead, d_in]
    init: dict[str, Tensor]  # trainable | frozen, as `init` made them
    names: tuple[str, ...]  # of the trainable ones
    trained: dict[str, Tensor]  # the same with noise on the trainable ones

    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.matrix, self.weight.bias)

    def __call__(self, params: dict[str, Tensor], x: Tensor | None = None, weight: Weight | None = None) -> Tensor:
        """What the engine computes, written down once more."""
        x = self.x if x is None else x
        base_out = self.base(self.variant.transform_input(x, params))
        return self.variant.apply(x, base_out, weight or self.weight, params)

    def at(self, trainable: dict[str, Tensor]) -> Tensor:
        return self({**self.trained, **trainable})


@st.composite
def layers(
    draw: st.DrawFn,
    case: Case,
    dtype: torch.dtype = torch.float64,
    sizes: st.SearchStrategy[int] = st.integers(1, 96),
    leads: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (5,), (2, 3), (2, 0, 3)),
) -> Layer:
    """A layer in `dtype`, with parameters in float32 (float64 for a float64 layer)."""
    d_out, d_in = draw(sizes), draw(sizes)
    rank = case.ranks(d_out, d_in)
    variant = case.make(**({} if rank is None else {"r": draw(rank)}))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    W = normal(d_out, d_in) / d_in**0.5
    b = normal(d_out) if draw(st.booleans()) else None
    weight = Weight(W.to(dtype), None if b is None else b.to(dtype))
    params = variant.init(weight, generator)
    wide = torch.promote_types(dtype, torch.float32)
    trainable = {name: leaf.to(wide) for name, leaf in params.trainable.items()}
    trained = {name: leaf + case.noise * normal(*leaf.shape).to(wide) for name, leaf in trainable.items()}
    x = normal(*draw(st.sampled_from(leads)), d_in).to(dtype)
    return Layer(variant, weight, x, {**trainable, **params.frozen}, tuple(trainable), {**trained, **params.frozen})
