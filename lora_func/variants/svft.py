"""SVFT: a sparse matrix between the singular vectors of the weight. Lingam et al. 2024,
arXiv 2405.19597.

    out = base_out + ((x Vᵀ) Mᵀ) Uᵀ,    M[rows, cols] = m, and zero elsewhere     ( W = U S V )

U [d_out, r] and V [r, d_in] hold the r largest singular triplets of the weight, which is read once,
at init. Only m is trained. It starts at zero, so the output at init is the base output to the bit,
and has a gradient there, since U and V are not zero. (The authors' code draws m, times a learned
gate, so its start moves the output.) `pattern` says which entries m holds:

    "plain"     the diagonal, r numbers: singular values are trained, and vectors stay
    "banded"    also d diagonals on either side, (2d + 1) r - d (d + 1) numbers
    "random"    as many, drawn once
    "topk"      as many, where |u_i · v_j| is largest; the weight must be square

The sign of u_i · v_j is that of the singular vectors, which is arbitrary, so "topk" takes its size.
The paper takes all triplets, r = min(d_in, d_out), whose vectors need twice the memory of W. In the
plain pattern signs cancel, so a file may leave U and V out (`lf.save(.., frozen="rebuild")`). The
paper's learning rate is 5e-2 for the plain pattern, and 1e-3 to 1e-2 for the random one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..checks import check_choice, check_fits, check_rank
from ..errors import LoraFuncError
from ..linalg import top_svd
from ..variant import Params
from ._low_rank import Product
from ._sparse import distinct, scattered


@dataclass(frozen=True, kw_only=True)
class SVFT(Product):
    """A sparse matrix between singular vectors, Lingam et al. 2024 (arXiv 2405.19597).

    Trainable: m [n].
    """

    card = Card(
        title="A sparse matrix between singular vectors",
        authors="Lingam et al. 2024",
        source="2405.19597",
        formula="base_out + ((x Vᵀ) Mᵀ) Uᵀ, M[rows, cols] = m",
        trainable={"m": "n"},
        reads="init",
        lr=1.0,
        width=8,
    )

    r: int = 256
    """Number of singular triplets, from 1 to min(d_in, d_out). The paper takes all."""
    pattern: str = "plain"
    """Which entries of M are trained: "plain", "banded", "random" or "topk", as in the table
    above."""
    d: int = 16
    """Diagonals on either side of the main one, from 1 to r - 1. Unused by "plain"."""

    def __post_init__(self):
        check_rank(self)
        check_choice(self, "pattern", ("plain", "banded", "random", "topk"))
        check_rank(self, "d")
        if self.pattern != "plain" and self.d >= self.r:
            raise LoraFuncError(f"SVFT(r={self.r}, d={self.d}): d must be below r")

    @property
    def n(self) -> int:
        """How many entries of M are trained."""
        d = 0 if self.pattern == "plain" else self.d
        return (2 * d + 1) * self.r - d * (d + 1)

    def positions(self, U, V, generator):
        """The trained entries of M, as indices `[n]` into its rows, one after the other."""
        if self.pattern == "random":
            return distinct(self.n, self.r**2, generator)
        if self.pattern == "topk":
            return (U.mT @ V.mT).abs().flatten().topk(self.n).indices.sort().values
        i = torch.arange(self.r)
        return ((i[:, None] - i).abs() <= self.d).flatten().nonzero()[:, 0]

    def init(self, weight, generator, stats=None):
        check_fits(self, weight.shape)
        if self.pattern == "topk" and weight.shape[0] != weight.shape[1]:
            raise LoraFuncError(
                f'SVFT(pattern="topk") on a layer of shape {tuple(weight.shape)}: it compares left '
                'with right singular vectors, so the weight must be square. Take "banded" or '
                '"random" there'
            )
        U, _, V = top_svd(weight.dense(), self.r)
        m, frozen = torch.zeros(self.n, dtype=torch.float32), {"U": U, "V": V}
        if self.pattern != "plain":
            at = self.positions(U, V, generator)
            frozen |= {"rows": (at // self.r).int(), "cols": (at % self.r).int()}
        return Params({"m": m}, frozen)

    def like(self, weight, leaves):
        d_out, d_in = weight.shape
        m, at = torch.empty(self.n), torch.empty(self.n, dtype=torch.int32)
        frozen = {"U": torch.empty(d_out, self.r), "V": torch.empty(self.r, d_in)}
        if self.pattern != "plain":
            frozen |= {"rows": at, "cols": at}
        return Params({"m": m}, frozen)

    def rebuild(self, weight, leaves):
        if self.pattern != "plain":
            return {}
        U, _, V = top_svd(weight.dense(), self.r)
        return {"U": U, "V": V}

    def pair(self, params):
        # U M is [d_out, r]: one product for each call, whatever the number of tokens
        U, m = params["U"], params["m"].to(params["U"].dtype)
        if self.pattern == "plain":
            return params["V"], U * m
        return params["V"], U @ scattered(m, params["rows"], params["cols"], (self.r, self.r))
