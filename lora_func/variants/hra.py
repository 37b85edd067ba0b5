"""HRA: an orthogonal map of a layer's input, as a product of Householder reflections. Yuan et al. 2024, arXiv 2405.17484.

    R = H_0 H_1 .. H_{r-1},   H_j = I - 2 û_j û_jᵀ,   û = u / |u|,   out = base layer of x Rᵀ,   W_eff = W R

U [r, d_in] holds the vectors as rows. Applied one by one they are r dependent launches that keep r copies of x; in compact
WY form they are one low-rank update of x that keeps one [.., r] intermediate, with V and K from one r x r triangular solve:

    x Rᵀ = x - (x Vᵀ) K

At init the vectors come in equal pairs, whose reflections cancel: R = I up to rounding (8 r eps of the dtype of x), not to
the bit. The first step separates the pairs (their gradients are opposite), so r is even; PEFT falls back to random vectors
for odd r, which is not the identity. Only the direction of a vector matters to R, but its length sets the angle that a step
of a given size turns it by: `init_norm`, by default the root mean square of PEFT's draw, sqrt(2 d_in / (3 r)). (lora-lite's
is sqrt(2 d_in / r) times shorter.) The paper's penalty on non-orthogonal vectors belongs to the loss. Reads no weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import LoraFuncError
from ..numerics import at_least_float32, compact_wy, low_rank_update, uniform
from ..variant import Params, Variant, check_positive, check_rank


@dataclass(frozen=True, kw_only=True)
class HRA(Variant):
    """Householder reflection adaptation, Yuan et al. 2024 (arXiv 2405.17484). Trainable: U [r, d_in]."""

    r: int = 8  # number of reflections, even
    init_norm: float | None = None  # length of the vectors at init, above 0; None: sqrt(2 d_in / (3 r))

    def __post_init__(self):
        check_rank(self)
        if self.r % 2:
            raise LoraFuncError(
                f"HRA(r={self.r}): r must be even, such as {self.r + 1}; reflections start in pairs that cancel"
            )
        if self.init_norm is not None:
            check_positive(self, "init_norm")

    def init(self, weight, generator, stats=None):
        d_in = weight.shape[1]
        norm = self.init_norm or math.sqrt(2 * d_in / (3 * self.r))
        half = uniform((self.r // 2, d_in), 1.0, generator)
        half = norm * half / half.norm(dim=1, keepdim=True)
        return Params({"U": half.repeat_interleave(2, dim=0)})

    def transform_input(self, x, params):
        V, K = compact_wy(params["U"].to(torch.promote_types(params["U"].dtype, x.dtype)))
        return low_rank_update(x, x, V, -K.mT)

    def merged(self, weight, params):
        # W R = W - (W Kᵀ) V
        V, K = compact_wy(params["U"])
        W = at_least_float32(weight.dense())
        return W - (W @ K.mT) @ V, weight.bias
