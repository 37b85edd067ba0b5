"""AntiPaSTO-rotation: shifted singular values and block-wise rotated singular vectors.
Clark 2026, arXiv 2601.07473.

    p = x V_rᵀ,    R = blockdiag((I - X)⁻¹ (I + X)),    X = c A / 2
    A = L tanh(skew(rot) / 2L),    L = 2 tan(theta / 2)

    rotate_basis "V":     out = base_out + [ c ds * (R p) + S * ((R - I) p) ] U_rᵀ
                 "U":     out = base_out + [ Rᵀ (c ds * p) + (R - I)ᵀ (S * p) ] U_rᵀ
                 "none":  out = base_out + ( c ds * p ) U_rᵀ

The first form of the family, with the chirality of lora-lite (the paper's V R is its transpose:
rot -> -rot). R is exactly orthogonal. R - I = (I - X)⁻¹ 2X and ds are zero at init, so the output
is the base output to the bit; lora-lite starts ds at 4e-4 + N(0, 4e-4), which no gradient needs.
tanh bounds each entry of A, not the angle of R: for blocks of 2 the angle is at most theta, for
blocks of 4 and theta = 0.5 it reaches 1.1 rad. The steering coefficient c multiplies the shift and
the generator of the rotation, as in the paper: `adapter.replace(coeff=-1.0)` gives R(-theta). With
calibration the directions are those with the largest mean |uᵢᵀ (y - b)|. The weight is read once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..card import Card
from ..checks import check_choice, check_number, check_positive, check_rank
from ..errors import LoraFuncError
from ..linalg import at_least_float32, cayley_minus_identity, skew
from ..statistics import Projections
from ..variant import Params
from ._directions import Turned, strongest_svd


@dataclass(frozen=True, kw_only=True)
class AntiPaSTORotation(Turned):
    """Rotated singular vectors, Clark 2026 (arXiv 2601.07473).

    Trainable: ds [r], rot [r / block_size, block_size (block_size - 1) / 2].
    """

    card = Card(
        title="Rotated singular vectors",
        authors="Clark 2026",
        source="2601.07473",
        formula="base_out + x (U ((S + c ds) R - S) V)ᵀ",
        trainable={"ds": "r", "rot": "rotations, block_size * (block_size - 1) // 2"},
        reads="init",
        data="optional",
        lr=0.1,
        width=8,
        beside_peft="not in PEFT; lora-lite adds noise at init",
    )

    r: int = 256
    """Number of singular directions, from 1 to min(d_in, d_out): a multiple of block_size."""
    block_size: int = 4
    """Number of directions that a rotation mixes, at least 2."""
    max_rotation_angle: float = 0.5
    """theta, in radians, above 0 and below pi. It bounds the angle for blocks of 2, and each entry
    of A for larger ones."""
    rotate_basis: str = "V"
    """Which singular vectors turn: "V", "U" or "none"."""
    coeff: float = 1.0
    """c, factor of the shift and the rotation: any number. It may change at inference; 0 is the
    base."""

    def __post_init__(self):
        check_rank(self)
        check_rank(self, "block_size")
        check_positive(self, "max_rotation_angle")
        check_choice(self, "rotate_basis", ("V", "U", "none"))
        check_number(self, "coeff")
        if self.block_size < 2 or self.r % self.block_size:
            raise LoraFuncError(
                f"AntiPaSTORotation(r={self.r}, block_size={self.block_size}): block_size must be "
                "at least 2 and divide r"
            )
        if self.max_rotation_angle >= math.pi:
            raise LoraFuncError(
                f"AntiPaSTORotation(max_rotation_angle={self.max_rotation_angle}): it must be "
                "below pi"
            )

    @property
    def rotations(self):
        """The number of rotations, or None."""
        return None if self.rotate_basis == "none" else self.r // self.block_size

    @property
    def statistic(self):
        return Projections(pool="mean_abs")

    def init(self, weight, generator, stats=None):
        U, S, V = strongest_svd(self, weight, stats)
        n, b = self.rotations, self.block_size
        trainable = {"ds": torch.zeros(self.r, dtype=torch.float32)}
        if n is not None:
            trainable["rot"] = torch.zeros(n, b * (b - 1) // 2, dtype=torch.float32)
        return Params(trainable, frozen={"U": U, "S": S, "V": V})

    def turn(self, params):
        """R - I, `[r / block_size, block_size, block_size]`."""
        bound = 2 * math.tan(self.max_rotation_angle / 2)
        rot = skew(at_least_float32(params["rot"]) / (2 * bound), self.block_size)
        return cayley_minus_identity(self.coeff * bound * torch.tanh(rot) / 2)

    def core(self, params):
        shift = {"shift": self.coeff * params["ds"]}
        return shift if self.rotate_basis == "none" else {**shift, "turn": self.turn(params)}

    def act(self, p, core):
        ds, S = core["shift"].to(p.dtype), core["S"].to(p.dtype)
        if self.rotate_basis == "none":
            return ds * p
        Q = core["turn"].to(p.dtype)  # R - I
        if self.rotate_basis == "V":
            turned = blockwise("nij,...nj->...ni", Q, p)  # (R - I) p
            return ds * (p + turned) + S * turned
        shifted = ds * p
        return shifted + blockwise("nji,...nj->...ni", Q, shifted + S * p)  # (R - I)ᵀ (..)


def blockwise(equation, Q, p):
    """Blocks `Q [n, b, b]` on the blocks of `p [.., n b]`."""
    return torch.einsum(equation, Q, p.unflatten(-1, (len(Q), -1))).flatten(-2)
