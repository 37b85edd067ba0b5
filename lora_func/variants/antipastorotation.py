"""AntiPaSTO-rotation: shifted singular values and block-wise rotated singular vectors. Clark 2026, arXiv 2601.07473.

    p = x V_rᵀ,    R = blockdiag((I - X)⁻¹ (I + X)),    X = A / 2,    A = L tanh(skew(rot) / 2L),    L = 2 tan(theta / 2)

    rotate_basis "V":     out = base_out + [ ds * (R p) + S * ((R - I) p) ] U_rᵀ
                 "U":     out = base_out + [ Rᵀ (ds * p) + (R - I)ᵀ (S * p) ] U_rᵀ
                 "none":  out = base_out + ( ds * p ) U_rᵀ

The first form of the family, with the chirality of lora-lite (the paper's V R is its transpose: rot -> -rot). R is exactly
orthogonal. R - I = (I - X)⁻¹ 2X and ds are zero at init, so the output is the base output to the bit; lora-lite starts ds at
4e-4 + N(0, 4e-4), which no gradient needs. tanh bounds each entry of A, not the angle of R: for blocks of 2 that is theta,
for blocks of 4 and theta = 0.5 up to 1.1 rad. With calibration the directions are chosen by the mean of |uᵢᵀ (y - b)|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibrate import Projections
from ..errors import LoraFuncError
from ..numerics import add_along, at_least_float32, full_precision, skew, strongest_svd
from ..variant import Params, Variant, check_choice, check_positive, check_rank


@full_precision
def cayley_minus_identity(X: Tensor) -> Tensor:
    """`(I - X)⁻¹ (I + X) - I = (I - X)⁻¹ 2X` for skew-symmetric `X [.., n, n]`: zero to the bit for X = 0."""
    X = at_least_float32(X)
    return torch.linalg.solve(torch.eye(X.shape[-1], dtype=X.dtype, device=X.device) - X, 2 * X)


@dataclass(frozen=True, kw_only=True)
class AntiPaSTORotation(Variant):
    """Rotated singular vectors, Clark 2026 (arXiv 2601.07473). Trainable: ds [r], rot [r/bs, bs(bs-1)/2]."""

    r: int = 256  # singular directions, from 1 to min(d_in, d_out), a multiple of block_size
    block_size: int = 4  # of the rotations, at least 2
    max_rotation_angle: float = 0.5  # theta, in radians, above 0 and below pi
    rotate_basis: str = "V"  # "V", "U" or "none"

    def __post_init__(self):
        check_rank(self)
        check_rank(self, "block_size")
        check_positive(self, "max_rotation_angle")
        check_choice(self, "rotate_basis", ("V", "U", "none"))
        if self.block_size < 2 or self.r % self.block_size:
            raise LoraFuncError(
                f"AntiPaSTORotation(r={self.r}, block_size={self.block_size}): block_size must be at least 2 and divide r"
            )
        if self.max_rotation_angle >= math.pi:
            raise LoraFuncError(f"AntiPaSTORotation(max_rotation_angle={self.max_rotation_angle}): it must be below pi")

    @property
    def statistic(self):
        return Projections(pool="mean_abs")

    def init(self, weight, generator, stats=None):
        U, S, V = strongest_svd(weight, self.r, "AntiPaSTORotation", stats)
        trainable = {"ds": torch.zeros(self.r)}
        if self.rotate_basis != "none":
            trainable["rot"] = torch.zeros(self.r // self.block_size, self.block_size * (self.block_size - 1) // 2)
        return Params(trainable, frozen={"U": U, "S": S, "V": V})

    def turn(self, params):
        """R - I, `[r / block_size, block_size, block_size]`."""
        bound = 2 * math.tan(self.max_rotation_angle / 2)
        A = bound * torch.tanh(skew(at_least_float32(params["rot"]) / (2 * bound), self.block_size))
        return cayley_minus_identity(A / 2)

    def core(self, p, params):
        """What comes out along U for the coordinates `p [.., r]` along V."""
        ds, S = params["ds"].to(p.dtype), params["S"].to(p.dtype)
        if self.rotate_basis == "none":
            return ds * p
        Q = self.turn(params).to(p.dtype)
        blocks = lambda t: t.unflatten(-1, (-1, self.block_size))  # noqa: E731
        if self.rotate_basis == "V":
            turned = torch.einsum("nij,...nj->...ni", Q, blocks(p)).flatten(-2)  # (R - I) p
            return ds * (p + turned) + S * turned
        shifted = ds * p
        return shifted + torch.einsum("nji,...nj->...ni", Q, blocks(shifted + S * p)).flatten(-2)  # (R - I)ᵀ (ds p + S p)

    def apply(self, x, base_out, weight, params):
        p = F.linear(x, params["V"].to(x.dtype))  # [.., r]
        return add_along(base_out, self.core(p, params), params["U"])

    def merged(self, weight, params):
        # W + U core(V): the rows of Vᵀ go through the core
        W = at_least_float32(weight.dense())
        return W + params["U"].to(W.dtype) @ self.core(params["V"].to(W.dtype).mT, params).mT, weight.bias
