"""FourierFT: a few frequencies of the update. Gao et al. 2024, arXiv 2405.03003.

    out = base_out + x ΔWᵀ,    ΔW = alpha Re IDFT₂(F),    F[rows, cols] = c, and zero elsewhere

F is the two-dimensional spectrum of ΔW: ΔW[j, k] is alpha / (d_out d_in) times the sum of
c_t cos(2π (rows_t j / d_out + cols_t k / d_in)). The n frequencies are different positions, drawn
once and stored. c [n] is zero at init, so the output is the base output to the bit. ΔW is linear in
c: another start, such as PEFT's N(0, 1), has the same gradient and adds noise to the weight. n and
alpha are PEFT's by default; the paper has alpha = 300. PEFT draws the frequencies of each layer
from one seed, 777: those of its files come in as the leaves rows and cols.

ΔW is made anew by one FFT in float32 for each product, in forward and in backward, and not kept.
As a product of cosines, of rank 2n, it would cost 2n (d_in + d_out) for each token: for n = 1000
more than d_in d_out up to d = 4000, and the cosines would be kept. A token that is decoded alone
pays for the FFT: merge the adapter to decode with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_positive, check_rank
from ..errors import LoraFuncError
from ..linalg import at_least_float32
from ..variant import Params, Variant
from ._sparse import distinct, scattered, sparse_product


def waves(S):
    """`Re DFT₂(S)`, `[.., o, i]`: the sum of S[u, v] cos(2π (u j / o + v k / i)) at j, k."""
    return torch.fft.fft2(S).real


@dataclass(frozen=True, kw_only=True)
class FourierFT(Variant):
    """Fourier-transform fine-tuning, Gao et al. 2024 (arXiv 2405.03003).

    Trainable: c [n].
    """

    card = Card(
        title="A few frequencies of the update",
        authors="Gao et al. 2024",
        source="2405.03003",
        formula="base_out + alpha x Re IDFT₂(F)ᵀ, F[rows, cols] = c",
        trainable={"c": "n"},
        reads="nothing",
        lr=3e-2,
        peft=Peft("FourierFTConfig", rank=None),
        beside_peft="the same function; PEFT starts c from N(0, 1) and keeps a dense ΔW",
    )

    n: int = 1000  # frequencies, from 1 to d_in d_out
    alpha: float = 150.0  # scale of the update, above 0

    def __post_init__(self):
        check_rank(self, "n")
        check_positive(self, "alpha")

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        if self.n > d_out * d_in:
            raise LoraFuncError(
                f"FourierFT(n={self.n}) on a layer of shape {(d_out, d_in)}: n must be at most "
                f"{d_out * d_in} there"
            )
        at = distinct(self.n, d_out * d_in, generator)
        c = torch.zeros(self.n, dtype=torch.float32)
        return Params({"c": c}, frozen={"rows": (at // d_in).int(), "cols": (at % d_in).int()})

    def like(self, weight, leaves):
        at = torch.empty(self.n, dtype=torch.int32)
        return Params({"c": torch.empty(self.n)}, frozen={"rows": at, "cols": at})

    def prepare(self, weight, params, dtype):
        c = params["c"].to(torch.promote_types(dtype, torch.float32))
        d_out, d_in = weight.shape
        return {**params, "c": self.alpha / (d_out * d_in) * c}

    def apply(self, x, base_out, weight, params):
        p, x = self.prepared(weight, params, base_out.dtype), x.to(base_out.dtype)
        delta = sparse_product(x, p["c"], p["rows"], p["cols"], weight.shape, through=waves)
        return base_out + delta

    def merged(self, weight, params):
        # W + ΔW
        W = at_least_float32(weight.dense())
        p = self.prepare(weight, params, W.dtype)
        return W + waves(scattered(p["c"], p["rows"], p["cols"], W.shape)), weight.bias
