"""OFT: block-wise rotations of the input. Qiu et al. 2023, arXiv 2306.07280; input-centric form:
Qiu et al. 2025, arXiv 2506.19847 (OFTv2).

    Q_n = skew(v_n),   R_n = (I + Q_n)(I - Q_n)⁻¹,   x'_n = x_n R_n,   out = base layer of x'

x_n is the n-th block of `block_size` inputs, and Q_n [b, b] has v_n in its upper triangle, row by
row. R_n is exactly orthogonal, so |x'| = |x| and W_eff W_effᵀ = W Wᵀ. v is zero at init, where
x' = x + x (R - I) is x to the bit. `terms` = k takes the Cayley-Neumann series of OFTv2 in place of
the inverse, R = (I + Q)(I + Q + .. + Q^(k-2)): no solve, orthogonal up to O(|Q|^(k-1)). `share`
uses one rotation for all blocks. The weight is never read, so every quantized layer works.

PEFT takes the series by default (k = 5). Its exact form is the inverse rotation, (I - Q)(I + Q)⁻¹,
so the same v gives two different adapters there. Here both forms have the paper's sign; -v imports
PEFT's exact form. PEFT's series differs from the formula for k < 4, which is refused here. PEFT
adjusts a block size that does not divide d_in; here it is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_choice, check_rank
from ..errors import LoraFuncError
from ..linalg import at_least_float32, cayley_minus_identity, skew
from ..variant import Params, Variant


@dataclass(frozen=True, kw_only=True)
class OFT(Variant):
    """Orthogonal fine-tuning, Qiu et al. 2023 (arXiv 2306.07280).

    Trainable: v [d_in / block_size, block_size (block_size - 1) / 2].
    """

    card = Card(
        title="Block-wise rotations of the input",
        authors="Qiu et al. 2023",
        source="2306.07280",
        formula="base layer of x blockdiag((I + Q)(I - Q)⁻¹)",
        trainable={"v": "blocks(d_in), block_size * (block_size - 1) // 2"},
        reads="nothing",
        lr=1e-3,
        peft=Peft("OFTConfig", rank=None),
        beside_peft="the same with terms=5; PEFT's exact form is the inverse rotation",
    )
    prepares_together = True

    block_size: int = 32
    """b, the number of inputs that a rotation mixes, at least 2; divides d_in."""
    share: bool = False
    """One rotation for all blocks of a layer. False: one for each."""
    terms: int | None = None
    """k, the number of terms of the Cayley-Neumann series (OFTv2), at least 4. None: the exact
    Cayley transform."""

    def __post_init__(self):
        check_rank(self, "block_size")
        check_choice(self, "share", (False, True))
        if self.block_size < 2:
            raise LoraFuncError(f"OFT(block_size={self.block_size}): block_size must be at least 2")
        if self.terms is not None:
            check_rank(self, "terms")
            if self.terms < 4:
                raise LoraFuncError(f"OFT(terms={self.terms}): terms must be at least 4, or None")

    def blocks(self, d_in: int) -> int:
        """The number of rotations."""
        return 1 if self.share else d_in // self.block_size

    def init(self, weight, generator, stats=None):
        d_in, b = weight.shape[1], self.block_size
        if d_in % b:
            raise LoraFuncError(
                f"OFT(block_size={b}) on a layer with {d_in} inputs: block_size must divide them"
            )
        return Params({"v": torch.zeros(self.blocks(d_in), b * (b - 1) // 2, dtype=torch.float32)})

    def turn(self, v):
        """R - I, `[blocks, b, b]`."""
        Q = skew(at_least_float32(v), self.block_size)
        if self.terms is None:
            return cayley_minus_identity(Q)
        series, double = Q, 2 * Q  # 2Q + 2Q² + .. + 2Q^(k-2) + Q^(k-1), by Horner's rule
        for _ in range(self.terms - 2):
            series = torch.baddbmm(double, Q, series)
        return series

    def prepare(self, weight, params, dtype):
        return {"R - I": self.turn(params["v"]).to(dtype)}

    def turned(self, x, turn):
        """x + x (R - I)"""
        blocks = x.unflatten(-1, (-1, self.block_size))
        turn = turn.expand(blocks.shape[-2], -1, -1)
        # The sum is laid out as x, but the product as a stack of blocks: to flatten it would copy.
        return (blocks + torch.einsum("...nk,nkl->...nl", blocks, turn).to(x.dtype)).flatten(-2)

    def transform_input(self, x, params):
        p = self.prepared(None, params, x.dtype)
        return self.turned(x, p["R - I"].to(x.dtype))

    def merged(self, weight, params):
        # W Rᵀ
        W = at_least_float32(weight.dense())
        return self.turned(W, self.turn(params["v"]).mT.to(W.dtype)), weight.bias
