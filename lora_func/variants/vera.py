"""VeRA: vectors that scale random matrices shared by all layers. Kopiczko et al. 2023,
arXiv 2310.11454.

    out = base_out + lb ∘ ( (ld ∘ (x A[:, :d_in]ᵀ)) B[:d_out]ᵀ )

A [r, largest d_in] and B [largest d_out, r] are random constants, one pair for all layers; each
layer slices what it needs. They are Kaiming-uniform with gain sqrt(2), U(±sqrt(6 / columns)), as
in PEFT. Training moves ld [r], which starts at d_initial, and lb [d_out], which starts at zero. So
the output at init is the base output to the bit, and only lb has a gradient there. Nothing of the
weight is read. The shapes of A and B depend on which layers are adapted, so a seed alone does not
give them back: the file stores them. As in PEFT there is no alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..card import Card, Peft
from ..checks import check_number, check_rank
from ..errors import LoraFuncError
from ..linalg import at_least_float32, over_rows, uniform
from ..variant import Params
from ._low_rank import Factored


@dataclass(frozen=True, kw_only=True)
class VeRA(Factored):
    """Vector-based random matrix adaptation, Kopiczko et al. 2023 (arXiv 2310.11454).

    Trainable: lb [d_out], ld [r].
    """

    card = Card(
        title="Scaled random matrices, shared by all layers",
        authors="Kopiczko et al. 2023",
        source="2310.11454",
        formula="base_out + lb ((ld (x Aᵀ)) Bᵀ)",
        trainable={"lb": "d_out", "ld": "r"},
        reads="nothing",
        lr=0.1,
        width=8,
        peft=Peft("VeraConfig"),
        beside_peft="the same function; PEFT draws A and B from a key of its own",
    )
    broadcasts = True

    r: int = 256
    """Rows of A and columns of B, at least 1. The default is PEFT's."""
    d_initial: float = 0.1
    """Where every entry of ld starts: any number but 0."""

    def __post_init__(self):
        check_rank(self)
        check_number(self, "d_initial")
        if not self.d_initial:
            raise LoraFuncError(
                "VeRA(d_initial=0.0): d_initial must not be 0, or nothing could learn"
            )

    def init(self, weight, generator, stats=None):
        ld = torch.full((self.r,), float(self.d_initial), dtype=torch.float32)
        return Params({"lb": torch.zeros(weight.shape[0], dtype=torch.float32), "ld": ld})

    def init_shared(self, weights, generator):
        d_out, d_in = (max(weight.shape[axis] for weight in weights) for axis in (0, 1))
        A = uniform((self.r, d_in), math.sqrt(6 / d_in), generator)
        B = uniform((d_out, self.r), math.sqrt(6 / self.r), generator)
        return Params({}, frozen={"A": A, "B": B})

    def prepare(self, weight, params, dtype):
        d_out, d_in = weight.shape
        own = {"A": params["A"][:, :d_in], "B": params["B"][:d_out]}
        own |= {name: params[name] for name in ("lb", "ld")}
        return {name: t.to(dtype) for name, t in own.items()}

    def apply(self, x, base_out, weight, params):
        p = self.prepared(weight, params, x.dtype)
        h = F.linear(x, p["A"].to(x.dtype))  # [.., r]
        h = h * over_rows(p["ld"]).to(h.dtype)
        delta = F.linear(h, p["B"].to(h.dtype))
        return base_out + (delta * over_rows(p["lb"]).to(delta.dtype)).to(base_out.dtype)

    def factors(self, weight, params):
        # W_eff = W + diag(lb) B diag(ld) A
        p = self.prepare(weight, params, at_least_float32(params["lb"]).dtype)
        return p["ld"][:, None] * p["A"], p["lb"][:, None] * p["B"]
