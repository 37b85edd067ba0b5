"""One entry per variant: what the laws need to know of it. A law never asks for a name; what differs is declared here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_func as lf
from lora_func.variant import Variant, Weight
from lora_func.weight import weight_of


@dataclass(frozen=True)
class Case:
    make: Callable[..., Variant]  # hyperparameters -> variant
    count: Callable[[int, int, int], int]  # (r, d_out, d_in) -> number of trainable parameters
    ranks: Callable[[int, int], st.SearchStrategy[int] | None] = lambda d_out, d_in: st.integers(1, 12)  # None: it has no r
    identity: Callable[[Variant, torch.dtype], float] = lambda variant, dtype: 0.0  # relative error at init; 0: to the bit
    reads: str = "nothing"  # of the weight: "nothing", "init" (dense, once), "rows" (a few rows through it on each call)
    data: bool = False  # whether init gets stats, see `stats_of`
    smallest: int = 1  # d_out and d_in that it takes
    noise: Callable[[Tensor], Tensor] = lambda n: 0.3 * n  # what is added to initial parameters to train them, n ~ N(0, 1)
    trains: bool = True  # whether it has trainable leaves
    engine: bool = True  # whether the tests of the engine run it too, and not the laws alone
    derivative: bool = True  # whether autograd returns the derivative of the function
    condition: Callable[[Layer], float] = lambda layer: 1.0  # by how much the formula itself amplifies rounding


def rank_one(d_out: int, d_in: int) -> st.SearchStrategy[int]:
    return st.integers(1, min(d_out, d_in, 12))


def even(d_out: int, d_in: int) -> st.SearchStrategy[int]:
    return st.integers(1, 6).map(lambda pairs: 2 * pairs)


def even_rank(d_out: int, d_in: int) -> st.SearchStrategy[int]:
    return st.integers(1, min(d_out, d_in, 12) // 2).map(lambda pairs: 2 * pairs)


def from_two(d_out: int, d_in: int) -> st.SearchStrategy[int]:
    return st.integers(2, min(d_out, d_in, 12))


def half(d_out: int, d_in: int) -> st.SearchStrategy[int]:
    return st.integers(1, min(d_out, d_in, 12) // 2)


def up_to_d_in(d_out: int, d_in: int) -> st.SearchStrategy[int]:
    return st.integers(1, min(d_in, 12))


def none(d_out: int, d_in: int) -> None:
    return None


def householder_error(variant: Variant, dtype: torch.dtype) -> float:
    return 8 * torch.finfo(dtype).eps * variant.r


def share(variant: Variant, dtype: torch.dtype) -> float:
    """What the variant adds at init, as a share of the base output: it does not start at the base."""
    return (variant.init_alpha if isinstance(variant, lf.AntiPaSTOAblate) else abs(variant.alpha)) + torch.finfo(dtype).eps


def cancellation(layer: Layer) -> float:
    """DoRA divides by the norms of the rows of W + s BA, which are short where the two terms cancel."""
    A, B = layer.trained["A"].double(), layer.trained["B"].double()
    W, s = layer.weight.matrix.double(), layer.variant.scale
    terms = W.abs() + s * B.abs() @ A.abs()
    return (terms.norm(dim=1) / (W + s * B @ A).norm(dim=1)).square().max().item()


def low_rank(r: int, d_out: int, d_in: int) -> int:
    return r * (d_out + d_in)


def rotation(r: int, **fields: Any) -> lf.AntiPaSTORotation:
    return lf.AntiPaSTORotation(r=r, block_size=4 if r % 4 == 0 else 2, **fields)


def arrow(r: int, **fields: Any) -> lf.AntiPaSTOArrow:
    return lf.AntiPaSTOArrow(r=r, block=r // 2, **fields)


def rotations(r: int, d_out: int, d_in: int) -> int:
    return r + r * ((4 if r % 4 == 0 else 2) - 1) // 2


def routed(r: int, d_out: int, d_in: int) -> int:
    return (r // 2) ** 2 + r - r // 2


# gates within (0, 1), outside of which their clamp has no gradient; from r = 2, because one number has only a sign
second = {"engine": False}  # another form of a variant that the engine has seen
gated = {"noise": lambda n: 0.05 * n, "identity": share}

CASES = {
    "lora": Case(lf.LoRA, low_rank),
    "lora-rs": Case(lambda r: lf.LoRA(r=r, rslora=True, alpha=4.0), low_rank),
    "pissa": Case(lf.PiSSA, low_rank, rank_one, reads="init"),
    "pissa-randomized": Case(lambda r: lf.PiSSA(r=r, svd="randomized"), low_rank, rank_one, reads="init", **second),
    "milora": Case(lf.MiLoRA, low_rank, rank_one, reads="init"),
    "olora": Case(lf.OLoRA, low_rank, rank_one, reads="init"),
    "corda": Case(lf.CorDA, low_rank, rank_one, reads="init", data=True),
    "corda-kpm": Case(lambda r: lf.CorDA(r=r, mode="kpm"), low_rank, rank_one, reads="init", data=True, **second),
    "loraga": Case(lf.LoRAGA, low_rank, half, data=True, smallest=2),
    "eva": Case(lf.EVA, low_rank, up_to_d_in, data=True),
    "eva-whiten": Case(lambda r: lf.EVA(r=r, rho=1.0, center=False, whiten=True), low_rank, up_to_d_in, data=True, **second),
    "dora": Case(lf.DoRA, lambda r, o, i: r * (o + i) + o, reads="rows", derivative=False, condition=cancellation),
    "dora-full": Case(
        lambda r: lf.DoRA(r=r, detach_norm=False), lambda r, o, i: r * (o + i) + o, reads="rows", condition=cancellation
    ),
    "delora": Case(lf.DeLoRA, lambda r, o, i: r * (o + i) + 1, reads="init"),
    "delora-paper": Case(lambda r: lf.DeLoRA(r=r, lambda0=2.0, init="paper"), lambda r, o, i: r * (o + i) + 1, reads="init"),
    "ia3": Case(lf.IA3, lambda r, o, i: o, none),
    "ia3ff": Case(lf.IA3FF, lambda r, o, i: i, none),
    "hra": Case(lf.HRA, lambda r, o, i: r * i, even, identity=householder_error),
    "ssvd": Case(lf.SSVD, lambda r, o, i: r * (r + 1) // 2, from_two, reads="init", smallest=2),
    "ssvd-approximate": Case(
        lambda r: lf.SSVD(r=r, approximate=True), lambda r, o, i: r * (r + 1) // 2, from_two, reads="init", smallest=2, **second
    ),
    "antipasto": Case(lf.AntiPaSTO, lambda r, o, i: r, rank_one, reads="init"),
    "antipasto-data": Case(lf.AntiPaSTO, lambda r, o, i: r, rank_one, reads="init", data=True, **second),
    "antipasto-suppress": Case(
        lambda r: lf.AntiPaSTO(r=r, coeff=0.7, suppress_only=True),
        lambda r, o, i: r,
        rank_one,
        reads="init",
        noise=lambda n: -0.3 * n.abs(),
        **second,
    ),
    "antipastorotation": Case(rotation, rotations, even_rank, reads="init", smallest=2),
    "antipastorotation-U": Case(
        lambda r: rotation(r, rotate_basis="U"), rotations, even_rank, reads="init", data=True, smallest=2, **second
    ),
    "antipastorotation-none": Case(
        lambda r: rotation(r, rotate_basis="none"), lambda r, o, i: r, even_rank, reads="init", smallest=2, **second
    ),
    "antipastocorda": Case(lf.AntiPaSTOCorDA, lambda r, o, i: r, rank_one, reads="init", data=True),
    "antipastoablate": Case(
        lambda r: lf.AntiPaSTOAblate(r=r, init_alpha=0.5), lambda r, o, i: r + 1, from_two, reads="init", smallest=2, **gated
    ),
    "antipastoablate-2": Case(
        lambda r: lf.AntiPaSTOAblate(r=r, k=2, init_alpha=0.5, coeff=0.8),
        lambda r, o, i: 2 * r + 2,
        from_two,
        reads="init",
        data=True,
        smallest=2,
        **gated,
        **second,
    ),
    "antipastoarrow": Case(arrow, routed, from_two, reads="init", smallest=2),
    "antipastoarrow-data": Case(
        lambda r: arrow(r, pool="mean_abs", coeff=-0.8), routed, from_two, reads="init", data=True, smallest=2, **second
    ),
    "ssteer": Case(
        lambda r: lf.SSteer(r=r, alpha=0.7), lambda r, o, i: 0, rank_one, reads="init", data=True, identity=share, trains=False
    ),
}


def catalogue(r: int = 4, at_base: bool = False) -> dict[str, Variant]:
    """What trains, at one rank, for tests of the engine; with `at_base`, what starts at the base (to rounding)."""
    cases = {name: case for name, case in CASES.items() if case.trains and case.engine}
    return {
        name: case.make(**({} if case.ranks(r, r) is None else {"r": r}))
        for name, case in cases.items()
        if not (at_base and case.identity is share)
    }


def stats_of(variant: Variant, weight: Weight, seed: int = 0) -> Any:
    """What calibration on some tokens gives the layer, for a variant that looks at data."""
    d_in, W = weight.shape[1], weight.dense()
    tokens = torch.randn(64, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (tokens * torch.linspace(0.5, 2, d_in) + 0.3).to(W)
    y = F.linear(x, W, None if weight.bias is None else weight.bias.to(W.dtype))
    if isinstance(variant, lf.SSteer):
        return y[:32].mean(0) - y[32:].mean(0)
    observed = {"inputs": x, "outputs": y, "gradients": (x, y.tanh() / 64)}[variant.statistic.observes]
    state = variant.statistic.update(variant.statistic.init(weight), observed)
    return variant.statistic.finalize({"": state})[""]


def data_for(variant: Any, model: nn.Module, targets: lf.Targets) -> dict[str, Any]:
    """The arguments that `lf.adapt` takes beyond these three, where the variant looks at data."""
    if getattr(variant, "statistic", None) is None and not isinstance(variant, lf.SSteer):
        return {}
    with torch.no_grad():
        return {"stats": {path: stats_of(variant, weight_of(model.get_submodule(path))) for path in targets.find(model)}}


@dataclass(frozen=True)
class Layer:
    """A linear layer with an adapter, drawn by hypothesis."""

    variant: Variant
    weight: Weight
    stats: Any  # what init got
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
    d_out, d_in = (max(case.smallest, draw(sizes)) for _ in range(2))
    rank = case.ranks(d_out, d_in)
    variant = case.make(**({} if rank is None else {"r": draw(rank)}))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    W = normal(d_out, d_in) / d_in**0.5
    b = normal(d_out) if draw(st.booleans()) else None
    weight = Weight(W.to(dtype), None if b is None else b.to(dtype))
    stats = stats_of(variant, weight, draw(st.integers(0, 99))) if case.data else None
    params = variant.init(weight, generator, stats)
    wide = torch.promote_types(dtype, torch.float32)
    trainable = {name: leaf.to(wide) for name, leaf in params.trainable.items()}
    trained = {name: leaf + case.noise(normal(*leaf.shape)).to(wide) for name, leaf in trainable.items()}
    x = normal(*draw(st.sampled_from(leads)), d_in).to(dtype)
    return Layer(variant, weight, stats, x, {**trainable, **params.frozen}, tuple(trainable), {**trained, **params.frozen})
