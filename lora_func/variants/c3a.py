"""C3A: an update of circulant blocks, by Fourier transforms. Chen et al. 2024, arXiv 2407.19342.

    out_p = base_out_p + Σ_q IDFT( conj(DFT w_pq) ∘ DFT x_q ) / d_in

x_q and out_p [b] are blocks of the input and the output; the block size b divides d_in and d_out.
Block p, q of the update is the circulant matrix of the kernel w_pq [b]: its entries are
w_pq[(j - i) mod b] / d_in. It has d_in d_out / b numbers in all, and its rank is not limited.

w starts at zero, so the output at init is the base output to the bit. The update is linear in w:
another start would have the same gradient. PEFT's default, Xavier, adds noise to the weight. PEFT
0.21's outputs are these, but its gradient in x is not: it correlates with w where the derivative is
a convolution.

The transform of a block is a product with a matrix of cosines and sines, in the dtype of x. torch's
FFT has no bfloat16, takes no empty batch on CPUs, and stays out of compiled code. On an H200, for
8192 tokens and d = 4096 in bfloat16, forward and backward take 2.2 ms for b = 256, and 2.6 ms and
twice the memory by FFT, which is faster for b = 4096. Backward keeps the transform of x, and not x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_rank
from ..linalg import at_least_float32
from ..variant import Params, Variant
from ._blocks import check_divides


@dataclass(frozen=True, kw_only=True)
class C3A(Variant):
    """Circular convolution adaptation, Chen et al. 2024 (arXiv 2407.19342).

    Trainable: w [d_out / block_size, d_in / block_size, block_size].
    """

    card = Card(
        title="Circulant blocks, by Fourier transforms",
        authors="Chen et al. 2024",
        source="2407.19342",
        formula="base_out_p + Σ_q IDFT(conj(DFT w_pq) ∘ DFT x_q) / d_in",
        trainable={"w": "d_out // block_size, d_in // block_size, block_size"},
        reads="nothing",
        lr=1.0,
        settings={"block_size": 32},
        peft=Peft("C3AConfig", rank=None),
        beside_peft="the same function; PEFT 0.21 has a wrong gradient in x",
    )
    prepares_together = True

    block_size: int = 256
    """b, the size of the circulant blocks, which divides d_in and d_out. A layer trains d_in
    d_out / b numbers."""

    def __post_init__(self):
        check_rank(self, "block_size")

    def init(self, weight, generator, stats=None):
        check_divides(self, "block_size", weight.shape)
        (d_out, d_in), b = weight.shape, self.block_size
        return Params({"w": torch.zeros(d_out // b, d_in // b, b, dtype=torch.float32)})

    def prepare(self, weight, params, dtype):
        w, b = params["w"].to(torch.promote_types(dtype, torch.float32)), self.block_size
        j, f = torch.arange(b, device=w.device), torch.arange(b // 2 + 1, device=w.device)
        angles = (j[:, None] * f % b).to(w.dtype) * (2 * math.pi / b)
        F = torch.cat([angles.cos(), angles.sin()], dim=1)  # [b, 2 f]
        # The frequencies above b / 2 are those below: they count twice, but for 0 and b / 2.
        weights = (2 - (2 * f % b == 0).to(w.dtype)) / (b * weight.shape[1])
        c, s = (w @ F).unflatten(-1, (2, -1)).mul(weights).unbind(-2)  # [p, q, f]
        M = torch.stack([c, -s, s, c]).unflatten(0, (2, 2))  # [2, 2, p, q, f]
        M = M.permute(4, 3, 0, 2, 1).flatten(3).flatten(1, 2)  # [f, 2 q, 2 p]
        return {"F": F.to(dtype), "M": M.to(dtype)}

    def apply(self, x, base_out, weight, params):
        p = {n: t.to(x.dtype) for n, t in self.prepared(weight, params, x.dtype).items()}
        x = x.unflatten(-1, (-1, self.block_size)) @ p["F"]  # [.., q, 2 f]
        x = x.unflatten(-1, (2, -1)).flatten(-3, -2)  # [.., 2 q, f]
        x = torch.einsum("...kf,fkl->...lf", x, p["M"])  # [.., 2 p, f]
        x = x.unflatten(-2, (-1, 2)).flatten(-2) @ p["F"].mT  # [.., p, b]
        return base_out + x.flatten(-2).to(base_out.dtype)

    def merged(self, weight, params):
        # W + w_pq[(j - i) mod b] / d_in
        w, at = at_least_float32(params["w"]), torch.arange(self.block_size, device=weight.device)
        blocks = w[..., (at - at[:, None]) % self.block_size]  # [p, q, i, j]
        W = at_least_float32(weight.dense())
        return W + blocks.transpose(1, 2).reshape(W.shape) / W.shape[1], weight.bias
