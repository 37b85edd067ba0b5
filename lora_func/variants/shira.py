"""SHiRA: a sparse update at fixed positions. Bhardwaj et al. 2024, arXiv 2406.13175.

    out = base_out + x ΔWᵀ,    ΔW[rows, cols] = v, and zero elsewhere

rows and cols [n] are n = r (d_in + d_out) different positions, as many numbers as a LoRA of rank r
has, chosen once; the rank of ΔW is not limited. v is zero at init, so the output is the base output
to the bit. Of the paper's five masks this file has three: random positions, as in PEFT; those of
the largest |W|; those of the largest |gradient| of W, summed over a few batches. The last is also
how RoSA (Nikdan et al. 2024, arXiv 2401.04679) chooses, whose other half is a LoRA:
`Chain(LoRA(), SHiRA(mask="gradient"))`.

ΔW is made anew for each product, in forward and in backward, and not kept. (A sum over the n
positions would keep [tokens, n].) So each token that is decoded alone pays for making it: merge the
adapter to decode with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft, amend_card
from ..checks import check_choice, check_fits, check_rank, needs_data
from ..linalg import at_least_float32
from ..statistics import OutputGradients
from ..variant import Params, Variant
from ._sparse import distinct, largest, scattered, sparse_product


@dataclass(frozen=True, kw_only=True)
class SHiRA(Variant):
    """Sparse high-rank adaptation, Bhardwaj et al. 2024 (arXiv 2406.13175).

    Trainable: v [r (d_in + d_out)].
    """

    card = Card(
        title="A sparse update at fixed positions",
        authors="Bhardwaj et al. 2024",
        source="2406.13175",
        formula="base_out + x ΔWᵀ, ΔW[rows, cols] = v",
        trainable={"v": "r * (d_in + d_out)"},
        reads="nothing",
        lr=0.01,
        peft=Peft("ShiraConfig"),
        beside_peft="the same function; PEFT keeps a dense W + ΔW of each layer for backward",
    )

    r: int = 32
    """A layer has as many numbers as a LoRA of this rank, r (d_in + d_out): from 1 to d_in
    d_out / (d_in + d_out). 32 is PEFT's default."""

    mask: str = "random"
    """Which positions are trained: "random"; "magnitude", those of the largest |W|; "gradient",
    those of the largest |gradient|, which needs data."""

    def __post_init__(self):
        check_rank(self)
        check_choice(self, "mask", ("random", "magnitude", "gradient"))
        if self.mask == "magnitude":
            amend_card(self, reads="init")
        elif self.mask == "gradient":
            amend_card(self, data="required")

    @property
    def statistic(self):
        return OutputGradients() if self.mask == "gradient" else None

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        check_fits(self, weight.shape, limit=d_out * d_in // (d_out + d_in))
        n = self.r * (d_in + d_out)
        if self.mask == "random":
            positions = distinct(n, d_out * d_in, generator)
        elif self.mask == "magnitude":
            positions = largest(weight.dense(), n)
        elif stats is None:
            raise needs_data(self, "the gradient on a few batches with labels")
        else:
            positions = largest(stats, n)
        rows, cols = (positions // d_in).int(), (positions % d_in).int()
        v = torch.zeros(n, dtype=torch.float32)
        return Params({"v": v}, frozen={"rows": rows, "cols": cols})

    def like(self, weight, leaves):
        n = self.r * sum(weight.shape)
        at = torch.empty(n, dtype=torch.int32)
        return Params({"v": torch.empty(n)}, frozen={"rows": at, "cols": at})

    def prepare(self, weight, params, dtype):
        return {**params, "v": params["v"].to(dtype)}

    def apply(self, x, base_out, weight, params):
        p, dtype = self.prepared(weight, params, base_out.dtype), base_out.dtype
        x, v = x.to(dtype), p["v"].to(dtype)  # as autocast would, which sees no custom function
        return base_out + sparse_product(x, v, p["rows"], p["cols"], weight.shape)

    def merged(self, weight, params):
        # W + ΔW
        v = at_least_float32(params["v"])
        delta = scattered(v, params["rows"], params["cols"], weight.shape)
        return at_least_float32(weight.dense()) + delta, weight.bias
