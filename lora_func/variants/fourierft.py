"""FourierFT: a few frequencies of the update. Gao et al. 2024, arXiv 2405.03003.

    out = base_out + x ΔWᵀ,    ΔW = alpha Re IDFT₂(F),    F[rows, cols] = c, and zero elsewhere

F is the two-dimensional spectrum of ΔW: ΔW[j, k] is alpha / (d_out d_in) times the sum of
c_t cos(2π (rows_t j / d_out + cols_t k / d_in)). The n frequencies are different positions, drawn
once and stored. c [n] is zero at init, so the output is the base output to the bit. ΔW is linear in
c: another start, such as PEFT's N(0, 1), has the same gradient and adds noise to the weight. PEFT
draws the frequencies of each layer from one seed, 777: those of its files come in as the leaves
rows and cols.

ΔW is made anew by one FFT in float32 for each product, in forward and in backward, and not kept. It
is real, so half of the spectrum is enough: a wave of the other half is one of this half, mirrored.
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
from ._sparse import distinct, sparse_product


def waves(h, rows, cols, shape):
    """`[o, i]`, the transform of a half spectrum with the entries h `[n]`, for cols <= i / 2.

    At j, k it is the sum of h_t cos(2π (cols_t k / i - rows_t j / o)), each counted twice for the
    other half, but for cols of 0 and i / 2.
    """
    o, i = shape
    # Waves of the two halves may meet at one frequency.
    S = h.new_zeros(o, i // 2 + 1).index_put((rows, cols), h, accumulate=True)
    return torch.fft.irfft(torch.fft.fft(S, dim=-2), n=i, norm="forward")


def amplitudes(M, rows, cols):
    """The adjoint of `waves`."""
    h = torch.fft.rfft2(M)[-rows, cols].real
    return torch.where(2 * cols % M.shape[-1] == 0, h, 2 * h)


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
        lr=0.1,
        peft=Peft("FourierFTConfig", rank=None),
        beside_peft="the same function; PEFT starts c from N(0, 1) and keeps a dense ΔW",
    )

    n: int = 1000
    """Number of trained frequencies, from 1 to d_in d_out. 1000 is PEFT's default."""
    alpha: float = 150.0
    """Scale of the update, above 0. 150 is PEFT's default; the paper takes 300."""

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
        d_out, d_in = weight.shape
        c = self.alpha / (d_out * d_in) * params["c"].to(torch.promote_types(dtype, torch.float32))
        rows, cols = params["rows"], params["cols"]
        other = 2 * cols > d_in
        return {
            "h": torch.where(2 * cols % d_in == 0, c, c / 2),
            "rows": torch.where(other, rows, -rows),
            "cols": torch.where(other, d_in - cols, cols),
        }

    def apply(self, x, base_out, weight, params):
        p, x = self.prepared(weight, params, base_out.dtype), x.to(base_out.dtype)
        at = p["rows"], p["cols"], weight.shape
        return base_out + sparse_product(x, p["h"], *at, make=waves, adjoint=amplitudes)

    def merged(self, weight, params):
        # W + ΔW
        W = at_least_float32(weight.dense())
        p = self.prepare(weight, params, W.dtype)
        return W + waves(p["h"], p["rows"], p["cols"], W.shape), weight.bias
