"""BOFT: rotations of the input in the pattern of a butterfly, and a scale for each output.
Liu et al. 2023, arXiv 2311.06243.

    x' = x B_m B_(m-1) .. B_1,    y = base layer of x',    out = y + ds (y - b)

B_i turns pairs of chunks of b/2 inputs: chunk c and chunk c + 2^(i-1), as the i-th step of the fast
Fourier transform joins them. Each pair [b] is turned by (I + Q)(I - Q)⁻¹ with Q = skew(v), as in
OFT. So B_1 is OFT's block-diagonal rotation with blocks of b = `block_size` inputs, and each
further factor doubles the inputs that mix. The product B_m .. B_1 is orthogonal and block-diagonal
with blocks of n = 2^(m-1) b inputs. `prepare` makes these blocks from n rows of identities. Then x
takes one product whatever m is, and no copy of x is kept.

v is zero at init, where x' = x + x (B_m .. B_1 - I) is x to the bit. ds is the deviation of the
scale from 1, also zero at init; it spares the bias, as in PEFT. The weight is never read. PEFT
trains both halves of Q and starts from the inverse rotation: -v imports it. Without its CUDA
extension it takes m = 1, whatever it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_rank
from ..errors import LoraFuncError
from ..linalg import at_least_float32, cayley_minus_identity, skew
from ..variant import Params, Variant
from .antipastorotation import blockwise


@dataclass(frozen=True, kw_only=True)
class BOFT(Variant):
    """Orthogonal butterfly, Liu et al. 2023 (arXiv 2311.06243).

    Trainable: v [m, d_in / block_size, block_size (block_size - 1) / 2], ds [d_out].
    """

    card = Card(
        title="Butterfly rotations of the input",
        authors="Liu et al. 2023",
        source="2311.06243",
        formula="(1 + ds) (base layer of x B_m .. B_1)",
        trainable={
            "v": "m, d_in // block_size, block_size * (block_size - 1) // 2",
            "ds": "d_out",
        },
        reads="nothing",
        lr=3e-3,
        peft=Peft("BOFTConfig", rank=None),
        beside_peft="the inverse rotation, and half the numbers; PEFT's m > 1 needs a compiler",
    )
    prepares_together = True

    block_size: int = 8
    """b, the number of inputs that one rotation turns: even. 8 is the paper's for language
    models."""
    m: int = 2
    """Number of butterfly factors, at least 1; 2^(m-1) b must divide d_in. 1 is OFT with a scale, 2
    the paper's for language models."""

    def __post_init__(self):
        check_rank(self, "block_size")
        check_rank(self, "m")
        if self.block_size % 2:
            raise LoraFuncError(f"BOFT(block_size={self.block_size}): block_size must be even")

    @property
    def mixed(self) -> int:
        """n, the number of inputs that mix."""
        return 2 ** (self.m - 1) * self.block_size

    def init(self, weight, generator, stats=None):
        (d_out, d_in), b = weight.shape, self.block_size
        if d_in % self.mixed:
            raise LoraFuncError(
                f"{self} on a layer with {d_in} inputs: 2^(m-1) block_size = {self.mixed} must "
                "divide them"
            )
        v = torch.zeros(self.m, d_in // b, b * (b - 1) // 2, dtype=torch.float32)
        return Params({"v": v, "ds": torch.zeros(d_out, dtype=torch.float32)})

    def factor(self, x, turn, i):
        """x (B_i - I), from the turns of the pairs minus the identity, `[d_in / b, b, b]`."""
        side, half = 2 ** (i - 1), self.block_size // 2
        pairs = x.unflatten(-1, (-1, 2, side, half)).transpose(-3, -2).flatten(-4)
        turned = blockwise("nkl,...nk->...nl", turn, pairs)
        return turned.unflatten(-1, (-1, side, 2, half)).transpose(-3, -2).flatten(-4)

    def turn(self, v):
        """B_m .. B_1 - I, `[d_in / n, n, n]`."""
        turns = cayley_minus_identity(skew(at_least_float32(v), self.block_size))
        n, d_in = self.mixed, v.shape[-2] * self.block_size
        eye = torch.eye(n, dtype=turns.dtype, device=turns.device).repeat(1, d_in // n)  # [n, d_in]
        D = torch.zeros_like(eye)
        for i in range(self.m, 0, -1):
            D = D + self.factor(eye + D, turns[i - 1], i)
        return D.unflatten(-1, (-1, n)).transpose(0, 1)

    def prepare(self, weight, params, dtype):
        p = {"R - I": self.turn(params["v"]), "ds": params["ds"]}
        if weight is not None and weight.bias is not None:
            p["b"] = weight.bias
        return {name: t.to(dtype) for name, t in p.items()}

    def transform_input(self, x, params):
        p = self.prepared(None, params, x.dtype)
        return x + blockwise("nkl,...nk->...nl", p["R - I"].to(x.dtype), x).to(x.dtype)

    def apply(self, x, base_out, weight, params):
        p, dtype = self.prepared(weight, params, base_out.dtype), base_out.dtype
        y = base_out - p["b"].to(dtype) if "b" in p else base_out
        return torch.addcmul(base_out, y, p["ds"].to(dtype))

    def merged(self, weight, params):
        # (1 + ds) W Rᵀ
        W = at_least_float32(weight.dense())
        W = W + blockwise("nkl,...nl->...nk", self.turn(params["v"]).to(W.dtype), W)
        return W + params["ds"][:, None] * W, weight.bias
