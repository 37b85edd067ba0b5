"""MiSS: one matrix shared by the shards of the input. Kang & Yin 2024, arXiv 2409.15371.

    out = base_out + (Σ_j x_j) D,   x_j [r] the j-th shard of x,   D [r, d_out]

If r does not divide d_in, the last shard is padded with zeros. D starts at zero, so the output at
init is the base output to the bit. It is LoRA with B = Dᵀ and a fixed A that tiles the identity, so
it needs about half of LoRA's parameters for the same rank.

PEFT's "mini" repeats a narrower D along the outputs: `mini_r` of them. Its "bat" multiplies shards
of the weight with matrices, another method, which the paper calls Bone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..card import Card, Peft
from ..checks import check_rank
from ..errors import LoraFuncError
from ..linalg import at_least_float32
from ..variant import Params
from ._low_rank import Factored


@dataclass(frozen=True, kw_only=True)
class MiSS(Factored):
    """Matrix shard sharing, Kang & Yin 2024 (arXiv 2409.15371).

    Trainable: D [r, d_out], or [r, mini_r].
    """

    card = Card(
        title="One matrix for all shards of the input",
        authors="Kang & Yin 2024",
        source="2409.15371",
        formula="base_out + (Σ_j x_j) D",
        trainable={"D": "r, columns(d_out)"},
        reads="nothing",
        lr=3e-3,
        width=2,
        peft=Peft("MissConfig"),
        beside_peft="the same function",
    )

    r: int = 64
    """Width of a shard of the input, from 1 to d_in. The rank of the update is r at most."""
    mini_r: int | None = None
    """Columns of D, which are repeated along the outputs: a divisor of d_out. None: d_out. It is
    PEFT's "mini"."""

    def __post_init__(self):
        check_rank(self)
        if self.mini_r is not None:
            check_rank(self, "mini_r")

    def columns(self, d_out: int) -> int:
        """The width of D."""
        return d_out if self.mini_r is None else self.mini_r

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        if self.r > d_in or d_out % self.columns(d_out):
            raise LoraFuncError(
                f"{self} on a layer of shape {(d_out, d_in)}: r must be at most {d_in}, and mini_r "
                f"must divide {d_out}"
            )
        return Params({"D": torch.zeros(self.r, self.columns(d_out), dtype=torch.float32)})

    def prepare(self, weight, params, dtype):
        D, times = params["D"].to(dtype), weight.shape[0] // params["D"].shape[-1]
        return {"D": D if times == 1 else D.repeat(1, times)}

    def apply(self, x, base_out, weight, params):
        p = self.prepared(weight, params, x.dtype)
        missing = -x.shape[-1] % self.r
        shards = (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, self.r))
        return base_out + (shards.sum(-2) @ p["D"].to(x.dtype)).to(base_out.dtype)

    def factors(self, weight, params):
        D = at_least_float32(params["D"])
        d_out, d_in = weight.shape
        tiles = torch.eye(self.r, dtype=D.dtype, device=D.device).repeat(1, -(-d_in // self.r))
        return tiles[:, :d_in], D.repeat(1, d_out // D.shape[-1]).mT
