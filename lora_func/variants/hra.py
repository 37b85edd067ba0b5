"""HRA: an orthogonal map of the input, a product of Householder reflections.
Yuan et al. 2024, arXiv 2405.17484.

    R = H_0 H_1 .. H_{r-1},   H_j = I - 2 û_j û_jᵀ,   û = u / |u|,   out = base layer of x Rᵀ

U [r, d_in] holds the vectors as rows; W_eff = W R. Reflecting one by one takes r dependent steps
and keeps r copies of x. The compact WY form is one low-rank update of x that keeps one [.., r]
intermediate, with V and K [r, d_in] from one triangular solve:

    x Rᵀ = x - (x Vᵀ) K

At init the vectors come in equal pairs whose reflections cancel: R = I up to rounding (8 r eps of
the dtype of x), not to the bit. The first step separates the pairs, because their gradients are
opposite. So r is even; PEFT falls back to random vectors for odd r, which is not the identity. R
depends on the directions of the vectors alone, but their length sets the angle by which a step
turns them. `init_norm` is by default the root mean square of PEFT's draw, sqrt(2 d_in / (3 r));
lora-lite's is sqrt(2 d_in / r) times shorter. The paper's penalty on non-orthogonal vectors belongs
to the loss. Nothing of the weight is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_positive, check_rank
from ..errors import LoraFuncError
from ..linalg import at_least_float32, compact_wy, low_rank_update, uniform
from ..variant import Params
from ._low_rank import Factored


@dataclass(frozen=True, kw_only=True)
class HRA(Factored):
    """Householder reflection adaptation, Yuan et al. 2024 (arXiv 2405.17484).

    Trainable: U [r, d_in].
    """

    card = Card(
        title="Householder reflection adaptation",
        authors="Yuan et al. 2024",
        source="2405.17484",
        formula="base layer of x (H_0 H_1 .. H_{r-1})ᵀ",
        trainable={"U": "r, d_in"},
        at_init="rounding",
        reads="nothing",
        lr=5e-3,
        peft=Peft("HRAConfig"),
        beside_peft="the same function; PEFT applies the reflections one by one",
    )
    broadcasts = rounds_last = prepares_together = True

    r: int = 8
    """Number of reflections: even, at least 2."""
    init_norm: float | None = None
    """Length of the vectors at init, above 0: the longer, the less a step turns them. None: sqrt(2
    d_in / (3 r)), as in PEFT."""

    def __post_init__(self):
        check_rank(self)
        if self.r % 2:
            raise LoraFuncError(
                f"HRA(r={self.r}): r must be even, such as {self.r + 1}; reflections start in "
                "pairs that cancel"
            )
        if self.init_norm is not None:
            check_positive(self, "init_norm")

    def init(self, weight, generator, stats=None):
        d_in = weight.shape[1]
        norm = self.init_norm or math.sqrt(2 * d_in / (3 * self.r))
        half = uniform((self.r // 2, d_in), 1.0, generator)
        half = norm * half / half.norm(dim=1, keepdim=True)
        return Params({"U": half.repeat_interleave(2, dim=0)})

    def prepare(self, weight, params, dtype):
        U = params["U"]
        V, K = compact_wy(U.to(torch.promote_types(U.dtype, dtype)))
        return {"A": V.to(dtype), "B": -K.mT.to(dtype)}

    def transform_input(self, x, params):
        p = self.prepared(None, params, x.dtype)
        return low_rank_update(x, x, p["A"], p["B"])

    def factors(self, weight, params):
        # W_eff = W R = W - (W Kᵀ) V
        W = at_least_float32(weight.dense())
        V, K = compact_wy(params["U"].to(torch.promote_types(params["U"].dtype, W.dtype)))
        return V, -(W.to(V.dtype) @ K.mT)
