"""One entry per variant: what the tests need to know of it, beyond its card.

A law never asks which variant it has. What differs is declared here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_func as lf
from lora_func.testing import ANY, Layer, stats_for
from lora_func.variant import Variant, Weight
from lora_func.weights.table import weight_of

Ranks = Callable[[int, int], "st.SearchStrategy[int] | None"]


@dataclass(frozen=True)
class Peft:
    """How PEFT has it. Its names of our leaves are those of `lora_func.interop.peft`."""

    fields: Mapping[str, Any] = field(default_factory=dict)  # of the config, beside the card's
    anchors: Mapping[str, str] = field(default_factory=dict)  # frozen leaf -> PEFT's, at init
    constants: Mapping[str, Callable[[Any], Tensor]] = field(default_factory=dict)
    """Frozen leaf -> its value in PEFT's layer."""
    twice: tuple[str, ...] = ()  # leaves of which PEFT trains two copies, with half the gradient
    gradient_in_x: bool = True  # whether PEFT's is that of its function


def of_statistic(variant: Variant, weight: Weight, seed: int) -> Any:
    """Stats of random tokens."""
    return stats_for(variant, weight, seed)


def difference_of_means(variant: Variant, weight: Weight, seed: int) -> Tensor:
    """Stats of a variant that steers between two sets of prompts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(weight.shape[0], generator=generator, dtype=torch.float64).to(weight.dense())


def float_weight(variant: Variant, weight: Weight, seed: int) -> Tensor:
    """Stats of a variant that makes up for quantization, which moved each entry by 10 % or so."""
    generator = torch.Generator().manual_seed(seed)
    W = weight.dense().double()
    return W + 0.1 * W.abs() * torch.randn(W.shape, generator=generator, dtype=W.dtype)


@dataclass(frozen=True)
class Case:
    make: Callable[..., Variant]  # hyperparameters -> variant
    ranks: Ranks = lambda d_out, d_in: st.integers(1, 12)  # None: it has no r
    smallest: int = 1  # d_out and d_in that it takes
    multiple: int = 1  # of which they are multiples
    stats: Callable[[Variant, Weight, int], Any] | None = (
        None  # what init gets, and from which seed
    )
    noise: Callable[[Tensor], Tensor] = lambda n: 0.3 * n  # what training adds, from N(0, 1)
    moved: Callable[[Any], float] = lambda variant: 0.0  # size of what it adds at init, by design
    condition: Callable[[Layer], float] = lambda layer: 1.0  # how the formula amplifies rounding
    activations: int = 0  # of the layer's size, that its gradient needs beside the input
    products: int = 1  # of rank r, whose intermediates its gradient needs
    remade: tuple[str, ...] = ()  # kernels that run anew for each token, by design
    rank: Callable[[Any], int] | None = None  # of the change, if it is not r, or 2 r by an anchor
    own_bias: bool = False  # whether it adds a bias, for which a parameter has no place
    engine: bool = True  # whether the tests of the engine run it, and not only the laws
    peft: Peft | None = None  # the differential test, for what PEFT has

    def variant(self, r: int) -> Variant:
        """With rank r, if it has one."""
        return self.make() if self.ranks(r, r) is None else self.make(r=r)

    @property
    def example(self) -> Variant:
        return self.variant(4)

    @property
    def trains(self) -> bool:
        return bool(self.example.card.trainable)


def up_to(limit: Callable[[int, int], int], smallest: int = 1, step: int = 1) -> Ranks:
    """Multiples of `step` up to a limit and to 12."""

    def ranks(d_out: int, d_in: int) -> st.SearchStrategy[int]:
        most = min(limit(d_out, d_in), 12) // step
        return st.integers(-(-smallest // step), most).map(lambda n: step * n)

    return ranks


def divisors(d_out: int, d_in: int) -> st.SearchStrategy[int]:
    """Sizes of blocks of the inputs, in the place of a rank."""
    return st.sampled_from([b for b in range(2, 13) if d_in % b == 0] or [d_in])


def common(d_out: int, d_in: int) -> st.SearchStrategy[int]:
    """Sizes of blocks of both."""
    return st.sampled_from([b for b in range(1, 97) if d_out % b == d_in % b == 0])


def even_groups(d_out: int, d_in: int) -> st.SearchStrategy[int]:
    """Sizes of groups of the outputs."""
    return st.sampled_from([g for g in range(2, 13, 2) if d_out % g == 0])


def blocks(d_out: int, d_in: int) -> st.SearchStrategy[int]:
    """Numbers of blocks, of 2 at least, of inputs and of outputs, in the place of a rank."""
    return st.sampled_from(
        [n for n in range(1, 13) if all(d % n == 0 and d >= 2 * n for d in (d_out, d_in))]
    )


def even_divisors(times: int) -> Ranks:
    """Even sizes of blocks of the inputs, of which `times` divide them too."""
    return lambda d_out, d_in: st.sampled_from(
        [b for b in range(2, 13, 2) if d_in % (times * b) == 0]
    )


fitting = up_to(min)
from_two = up_to(min, smallest=2)
none: Ranks = lambda d_out, d_in: None  # noqa: E731


def cancellation(layer: Layer) -> float:
    """DoRA divides by the norms of the rows of W + s BA, which are short if the two cancel."""
    A, B = layer.trained["A"].double(), layer.trained["B"].double()
    variant: Any = layer.variant
    W, s = layer.weight.matrix.double(), variant.scale
    terms = W.abs() + s * B.abs() @ A.abs()
    return (terms.norm(dim=1) / (W + s * B @ A).norm(dim=1)).square().max().item()


def granular(variant: Any) -> int:
    """k blocks in a row, each of rank r / k, and what stands beside them."""
    return variant.k * variant.r + variant.hybrid_r


def squared(variant: Any) -> int:
    """A product entry by entry multiplies ranks."""
    return variant.r * variant.r


def within(variant: Any) -> int:
    """Its low-rank core lies within the r directions."""
    return variant.r


def rotation(r: int, **fields: Any) -> lf.AntiPaSTORotation:
    return lf.AntiPaSTORotation(r=r, block_size=4 if r % 4 == 0 else 2, **fields)


def arrow(r: int, **fields: Any) -> lf.AntiPaSTOArrow:
    return lf.AntiPaSTOArrow(r=r, block=r // 2, **fields)


ANCHORS = {"A0": "lora_A.default.weight", "B0": "lora_B.default.weight"}
FREQUENCIES = {
    "rows": lambda layer: layer.indices["default"][0],
    "cols": lambda layer: layer.indices["default"][1],
}
POSITIONS = {
    "rows": lambda layer: layer.shira_indices["default"][0],
    "cols": lambda layer: layer.shira_indices["default"][1],
}
second: dict[str, Any] = {"engine": False}  # another form of a variant that the engine has seen
data: dict[str, Any] = {"stats": of_statistic}

TINY = {
    "A": lambda layer: layer.tinylora_A["default"],
    "B": lambda layer: layer.tinylora_B["default"],
    "P": lambda layer: layer.tinylora_P["default"],
}


def banked(r: int, **fields: Any) -> lf.VBLoRA:
    return lf.VBLoRA(r=r, num_vectors=6, vector_length=2, **fields)


CASES = {
    "lora": Case(lf.LoRA, peft=Peft()),
    "lora-rs": Case(
        lambda r: lf.LoRA(r=r, rslora=True, alpha=4.0),
        peft=Peft({"use_rslora": True, "lora_alpha": 4.0}),
    ),
    "lora-gaussian": Case(lambda r: lf.LoRA(r=r, start="gaussian"), **second),
    "lora-bias": Case(
        lambda r: lf.LoRA(r=r, add_bias=True),
        own_bias=True,
        peft=Peft({"lora_bias": True}),
        **second,
    ),
    "pissa": Case(lf.PiSSA, fitting, products=2, peft=Peft(anchors=ANCHORS)),
    "pissa-rs": Case(
        lambda r: lf.PiSSA(r=r, rslora=True, alpha=4.0),
        fitting,
        peft=Peft({"use_rslora": True, "lora_alpha": 4.0}, ANCHORS),
        **second,
    ),
    "pissa-randomized": Case(
        lambda r: lf.PiSSA(r=r, svd="randomized", alpha=5.0), fitting, **second
    ),
    "milora": Case(lf.MiLoRA, fitting, products=2),
    "olora": Case(lf.OLoRA, fitting, products=2, peft=Peft(anchors=ANCHORS)),
    "corda": Case(lf.CorDA, fitting, products=2, **data),
    "corda-kpm": Case(lambda r: lf.CorDA(r=r, mode="kpm"), fitting, **data, **second),
    "corda-randomized": Case(
        lambda r: lf.CorDA(r=r, svd="randomized", alpha=5.0), fitting, **data, **second
    ),
    "loraga": Case(lf.LoRAGA, up_to(lambda o, i: min(o, i) // 2), smallest=2, products=2, **data),
    "loraga-random": Case(
        lambda r: lf.LoRAGA(r=r, direction="random", start_scale="weight_svd", rslora=True),
        up_to(lambda o, i: min(o, i) // 2),
        smallest=2,
        **data,
        **second,
    ),
    "initab": Case(lf.InitAB, products=2),
    "initab-orthogonal": Case(
        lambda r: lf.InitAB(r=r, start="orthogonal", rslora=True),
        up_to(lambda o, i: 12, smallest=2, step=2),
        **second,
    ),
    "eva": Case(lf.EVA, up_to(lambda o, i: i), **data),
    "eva-whiten": Case(
        lambda r: lf.EVA(r=r, rho=1.0, center=False, whiten=True),
        up_to(lambda o, i: i),
        **data,
        **second,
    ),
    "loftq": Case(
        lf.LoftQ,
        fitting,
        stats=float_weight,
        moved=lambda variant: 0.5,
        engine=False,  # most of its tests give no stats
    ),
    "adalora": Case(
        lambda r: lf.AdaLoRA(r=r),
        peft=Peft({"target_r": 4, "lora_alpha": 16}),
    ),
    "loraxs": Case(lambda r: lf.LoRAXS(r=r, alpha=4.0), fitting),
    "tinylora": Case(
        lambda r: lf.TinyLoRA(r=r, n=5),
        fitting,
        peft=Peft({"u": 5}, constants=TINY),
    ),
    "tinylora-shared": Case(lambda r: lf.TinyLoRA(r=r, n=5, share=True), fitting, **second),
    "gralora": Case(
        lf.GraLoRA,
        up_to(lambda o, i: 12, smallest=2, step=2),
        smallest=2,
        multiple=2,
        products=2,
        rank=granular,
        peft=Peft({"alpha": 64}),
    ),
    "gralora-hybrid": Case(
        lambda r: lf.GraLoRA(r=r, alpha=9.0, k=4 if r % 4 == 0 else 2, hybrid_r=3),
        up_to(lambda o, i: 12, smallest=2, step=2),
        smallest=4,
        multiple=4,
        products=5,
        rank=granular,
        peft=Peft({"alpha": 9, "gralora_k": 4, "hybrid_r": 3}),
        **second,
    ),
    # Their one product has rank r², 16 at the rank 4 at which `products` is read.
    "loha": Case(lf.LoHa, products=4, rank=squared, peft=Peft({"alpha": 8})),
    "hira": Case(
        lf.HiRA,
        remade=("aten.mm.default", "aten.mul.Tensor"),  # W ∘ (B A), which is not kept
        peft=Peft(),
    ),
    # Two intermediates of m r and of l r, with l = m = 16 where `products` is read.
    "lokr": Case(lf.LoKr, products=32, peft=Peft()),
    "lokr-factor": Case(
        lambda r: lf.LoKr(r=r, alpha=3.0, decompose_factor=2),
        products=32,
        peft=Peft({"alpha": 3, "decompose_factor": 2}),
        **second,
    ),
    "lokr-both": Case(
        lambda r: lf.LoKr(r=r, decompose_factor=12, decompose_both=True),
        products=40,
        peft=Peft({"decompose_factor": 12, "decompose_both": True}),
        **second,
    ),
    "abba": Case(lf.ABBA, fitting, products=4, rank=squared),
    "miss": Case(
        lf.MiSS,
        up_to(lambda o, i: i),
        peft=Peft(),
    ),
    "dora": Case(
        lf.DoRA,
        activations=1,  # base_out, for the gradient of its magnitudes
        condition=cancellation,
        peft=Peft(),
    ),
    "dora-rs": Case(
        lambda r: lf.DoRA(r=r, rslora=True, alpha=4.0),
        activations=1,
        condition=cancellation,
        peft=Peft({"use_rslora": True, "lora_alpha": 4.0}),
        **second,
    ),
    "dora-full": Case(
        lambda r: lf.DoRA(r=r, detach_norm=False), activations=1, condition=cancellation
    ),
    "delora": Case(
        lambda r: lf.DeLoRA(r=r, lambda0=3.0),
        peft=Peft({"delora_lambda": 3.0}),
    ),
    "delora-paper": Case(lambda r: lf.DeLoRA(r=r, lambda0=2.0, start="paper")),
    "vera": Case(
        lf.VeRA,
        activations=1,  # B h, for the gradient of lb
        peft=Peft(),
    ),
    "randlora": Case(
        lambda r: lf.RandLoRA(r=r, alpha=5.0),
        remade=("aten.mul.Tensor", "aten.mul.Tensor"),  # S, which is not kept
        peft=Peft({"randlora_alpha": 5}),
    ),
    # Beside intermediates, the vectors that are chosen and where: many, at a length of 2.
    "vblora": Case(banked, smallest=2, multiple=2, products=4),
    "vblora-peft": Case(
        lambda r: banked(r, topk=3, start="peft"),
        smallest=2,
        multiple=2,
        products=4,
        moved=lambda variant: 0.05,
        peft=Peft({"num_vectors": 6, "vector_length": 2, "topk": 3}),
        **second,
    ),
    "ia3": Case(lf.IA3, none, activations=1, peft=Peft()),
    "ia3ff": Case(lf.IA3FF, none, peft=Peft()),
    "hra": Case(
        lf.HRA,
        up_to(lambda o, i: 12, smallest=2, step=2),
        peft=Peft(),
    ),
    "ether": Case(
        lambda r: lf.ETHER(n=r),
        blocks,
        smallest=2,
        multiple=2,
        moved=lambda variant: 2.0,  # the norm of H - I
        rank=lambda variant: variant.n,
    ),
    "etherplus": Case(
        lambda r: lf.ETHERPlus(n=r),
        blocks,
        smallest=2,
        multiple=2,
        activations=1,  # base_out, for the gradient of its vectors
        products=4,  # of rank n and 2 sides, each a difference
        rank=lambda variant: 4 * variant.n,
    ),
    "oft": Case(
        lambda r: lf.OFT(block_size=r),
        divisors,
        smallest=2,
        peft=Peft({"oft_block_size": 4, "use_cayley_neumann": False}),
    ),
    "oft-neumann": Case(
        lambda r: lf.OFT(block_size=r, terms=5),
        divisors,
        smallest=2,
        peft=Peft({"oft_block_size": 4}),
        **second,
    ),
    "oft-shared": Case(
        lambda r: lf.OFT(block_size=r, share=True),
        divisors,
        smallest=2,
        peft=Peft({"oft_block_size": 4, "block_share": True, "use_cayley_neumann": False}),
        **second,
    ),
    "boft": Case(
        lambda r: lf.BOFT(block_size=r, m=1),
        even_divisors(1),
        smallest=2,
        multiple=2,
        activations=1,  # base_out, for the gradient of its scales
        peft=Peft({"boft_block_size": 4}, twice=("v",)),
    ),
    "boft-2": Case(
        lambda r: lf.BOFT(block_size=r, m=2),
        even_divisors(2),
        smallest=4,
        multiple=4,
        activations=1,
        peft=Peft({"boft_block_size": 4, "boft_n_butterfly_factor": 2}, twice=("v",)),
        **second,
    ),
    "boft-3": Case(
        lambda: lf.BOFT(block_size=2, m=3),
        none,
        smallest=8,
        multiple=8,
        activations=1,
        **second,
    ),
    "road": Case(
        lambda r: lf.ROAD(group_size=r),
        even_groups,
        smallest=2,
        multiple=2,
        activations=1,  # base_out, for the gradient of its angles
        peft=Peft({"group_size": 4}),
    ),
    "road-2": Case(
        lambda r: lf.ROAD(kind="road_2", group_size=r),
        even_groups,
        smallest=2,
        multiple=2,
        activations=1,
        peft=Peft({"group_size": 4, "variant": "road_2"}),
        **second,
    ),
    "road-4": Case(
        lambda r: lf.ROAD(kind="road_4", group_size=r),
        even_groups,
        smallest=2,
        multiple=2,
        activations=1,
        peft=Peft({"group_size": 4, "variant": "road_4"}),
        **second,
    ),
    "ssvd": Case(lf.SSVD, from_two, smallest=2),
    "ssvd-approximate": Case(
        lambda r: lf.SSVD(r=r, approximate=True), from_two, smallest=2, **second
    ),
    "svft": Case(lf.SVFT, fitting),
    "svft-banded": Case(
        lambda r: lf.SVFT(r=r, pattern="banded", d=1), from_two, smallest=2, **second
    ),
    "svft-random": Case(
        lambda r: lf.SVFT(r=r, pattern="random", d=1), from_two, smallest=2, **second
    ),
    "antipasto": Case(lf.AntiPaSTO, fitting),
    "antipasto-data": Case(lf.AntiPaSTO, fitting, **data, **second),
    "antipasto-suppress": Case(
        lambda r: lf.AntiPaSTO(r=r, coeff=0.7, suppress_only=True),
        fitting,
        noise=lambda n: -0.3 * n.abs(),
        **second,
    ),
    "antipastorotation": Case(rotation, up_to(min, 2, step=2), smallest=2),
    "antipastorotation-U": Case(
        lambda r: rotation(r, rotate_basis="U", coeff=-0.7),
        up_to(min, 2, step=2),
        smallest=2,
        **data,
        **second,
    ),
    "antipastorotation-none": Case(
        lambda r: rotation(r, rotate_basis="none"), up_to(min, 2, step=2), smallest=2, **second
    ),
    "antipastocorda": Case(lf.AntiPaSTOCorDA, fitting, **data),
    "antipastocorda-diagonal": Case(
        lambda r: lf.AntiPaSTOCorDA(r=r, diagonal=True), fitting, **data, **second
    ),
    # The noise keeps gates within (0, 1): their clamp has no gradient outside. From r = 2 on,
    # because one number has only a sign.
    "antipastoablate": Case(
        lambda r: lf.AntiPaSTOAblate(r=r, init_alpha=0.5),
        from_two,
        activations=1,  # base_out, for the gradient of its directions
        smallest=2,
        noise=lambda n: 0.05 * n,
        moved=lambda variant: variant.init_alpha,
    ),
    "antipastoablate-2": Case(
        lambda r: lf.AntiPaSTOAblate(r=r, k=2, init_alpha=0.5, coeff=0.8),
        from_two,
        activations=1,
        smallest=2,
        noise=lambda n: 0.05 * n,
        moved=lambda variant: variant.init_alpha,
        **data,
        **second,
    ),
    "antipastoarrow": Case(arrow, from_two, smallest=2),
    "antipastoarrow-data": Case(
        lambda r: arrow(r, pool="mean_abs", coeff=-0.8), from_two, smallest=2, **data, **second
    ),
    "antipastodplr": Case(lambda r: lf.AntiPaSTODPLR(r=r, k=1), fitting, products=2, rank=within),
    "antipastodplr-data": Case(
        lambda r: lf.AntiPaSTODPLR(r=r, k=r, coeff=-0.8, suppress_only=True, pool="mean_abs"),
        fitting,
        noise=lambda n: -0.3 * n.abs(),
        products=3,
        rank=within,
        **data,
        **second,
    ),
    "shira": Case(
        lf.SHiRA,
        up_to(lambda o, i: o * i // (o + i)),
        smallest=2,
        remade=("aten.new_zeros.default", "aten.index_put.default"),  # ΔW, which is not kept
        peft=Peft(constants=POSITIONS),
    ),
    "shira-magnitude": Case(
        lambda r: lf.SHiRA(r=r, mask="magnitude"),
        up_to(lambda o, i: o * i // (o + i)),
        smallest=2,
        remade=("aten.new_zeros.default", "aten.index_put.default"),
        **second,
    ),
    "shira-gradient": Case(
        lambda r: lf.SHiRA(r=r, mask="gradient"),
        up_to(lambda o, i: o * i // (o + i)),
        smallest=2,
        remade=("aten.new_zeros.default", "aten.index_put.default"),
        **second,
        **data,
    ),
    "fourierft": Case(
        lambda r: lf.FourierFT(n=5 * r, alpha=100.0),
        up_to(lambda o, i: o * i // 5),
        smallest=3,
        # ΔW, which is not kept
        remade=(
            "aten.new_zeros.default",
            "aten.index_put.default",
            "aten._fft_r2c.default",
            "aten._fft_c2r.default",
        ),
        peft=Peft({"n_frequency": 20, "scaling": 100.0}, constants=FREQUENCIES),
    ),
    "c3a": Case(
        lambda r: lf.C3A(block_size=r),
        common,
        smallest=4,
        multiple=4,
        activations=2,  # the transform of x, 1.5 of its size for blocks of 4
        peft=Peft({"block_size": 4}, gradient_in_x=False),
    ),
    "full": Case(lf.Full, none),
    "ssteer": Case(
        lambda r: lf.SSteer(r=r, alpha=0.7),
        fitting,
        stats=difference_of_means,
        moved=lambda variant: abs(variant.alpha),
    ),
    "chain": Case(
        lambda r: lf.Chain(lf.LoRA(r=r), lf.HRA(r=2), lf.IA3()),
        fitting,
        smallest=2,
        activations=2,  # the input that HRA makes for LoRA, and the output that IA3 scales
    ),
}


def catalogue(r: int = 4, at_base: bool = False) -> dict[str, Variant]:
    """What trains, at one rank, for tests of the engine; `at_base`: what starts at the base."""
    return {
        name: case.variant(r)
        for name, case in CASES.items()
        if case.trains and case.engine and not (at_base and starts_elsewhere(case.example))
    }


def starts_elsewhere(variant: Variant) -> bool:
    return variant.card.at_init == "moved"


def stats_of(variant: Variant, weight: Weight, seed: int = 0) -> Any:
    """What `init` gets for a layer; None if the variant looks at no data."""
    case = CASES.get(variant.name())
    return ((case and case.stats) or of_statistic)(variant, weight, seed)


def data_for(rules: Any, model: nn.Module, targets: lf.Targets) -> dict[str, Any]:
    """The arguments that `lf.adapt` takes beyond these three, if the variant looks at data."""
    if not isinstance(rules, Variant) or rules.card.data == "none":
        return {}
    with torch.no_grad():
        layers = {path: model.get_submodule(path) for path in targets.find(model)}
        return {"stats": {path: stats_of(rules, weight_of(x)) for path, x in layers.items()}}


@st.composite
def layers(
    draw: st.DrawFn,
    case: Case,
    dtype: torch.dtype = torch.float64,
    sizes: st.SearchStrategy[int] = st.integers(1, 96),
    leads: tuple[tuple[int, ...], ...] = ANY,
) -> Layer:
    """A layer in `dtype`, with parameters in float32 (float64 for a float64 layer)."""
    d_out, d_in = (
        max(case.smallest, n - n % case.multiple) for n in (draw(sizes) for _ in range(2))
    )
    rank = case.ranks(d_out, d_in)
    variant = case.make(**({} if rank is None else {"r": draw(rank)}))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    stats, seed = case.stats, draw(st.integers(0, 99))
    layer = Layer.draw(
        variant,
        (d_out, d_in),
        generator,
        lead=draw(st.sampled_from(leads)),
        bias=draw(st.booleans()),
        dtype=dtype,
        noise=case.noise,
        stats=None if stats is None else lambda weight: stats(variant, weight, seed),
        moved=case.moved(variant),
    )
    return dataclasses.replace(layer, condition=case.condition(layer))


def over(*names: str):
    """Runs a test on drawn layers of each of these cases, with inputs of five tokens."""

    def decorate(test):
        def run(case, data):
            test(data.draw(layers(case, sizes=st.integers(2, 24), leads=((5,),))), data)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        cases = [pytest.param(CASES[name], id=name) for name in names]
        return pytest.mark.parametrize("case", cases)(given(data=st.data())(run))

    return decorate
