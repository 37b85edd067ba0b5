"""S-steer: steering in the space of singular directions, without training. After wassname's ssteer-eval-aware.

    z = (base_out - b) U,    out = base_out + alpha (dS * z) Uᵀ                     ( = S_r scaled by 1 + alpha dS )

    dS = normalized( (Uᵀ h) * sqrt(S) ),    h = mean output on positive prompts - mean output on negative ones

U [d_out, r] and S are the top singular triplets of W. Nothing is trained: h comes in as the stats of each layer, the
difference of two collections,

    positive, negative = (lf.collect(model, targets, batches, lf.OutputMeans()) for batches in (positive, negative))
    adapter, params = lf.adapt(model, lf.SSteer(), targets=targets, stats={k: positive[k] - negative[k] for k in positive})

and `alpha` may be changed at inference: `adapter.replace(alpha=-4.0)` steers the other way, 0 is the base output to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import LoraFuncError
from ..numerics import add_along, coordinates, cored, top_svd
from ..variant import Params, Variant, check_number, check_rank


@dataclass(frozen=True, kw_only=True)
class SSteer(Variant):
    """Steering of singular directions, wassname 2025 (github.com/wassname/ssteer-eval-aware). Trainable: nothing."""

    r: int = 64  # singular directions, from 1 to min(d_in, d_out)
    alpha: float = 1.0  # strength, any number; may change at inference

    def __post_init__(self):
        check_rank(self)
        check_number(self, "alpha")

    def init(self, weight, generator, stats=None):
        if stats is None:
            raise LoraFuncError(
                "SSteer steers along a difference of mean outputs: pass stats={path: positive - negative}, of two "
                "lf.collect(model, targets, batches, lf.OutputMeans())"
            )
        U, S, _ = top_svd(weight, self.r, "SSteer")
        dS = (stats.to(U) @ U) * S.sqrt()  # [r]
        if not dS.norm() > 0:
            raise LoraFuncError("SSteer steers along a difference of mean outputs, and this one is 0 or not finite")
        return Params({}, frozen={"U": U, "dS": dS / dS.norm()})

    def like(self, weight, leaves):
        return Params({}, frozen={"U": torch.empty(weight.shape[0], self.r), "dS": torch.empty(self.r)})

    def apply(self, x, base_out, weight, params):
        z = coordinates(base_out, weight.bias, params["U"])  # [.., r]
        return add_along(base_out, z * (self.alpha * params["dS"]).to(z.dtype), params["U"])

    def merged(self, weight, params):
        # (I + alpha U diag(dS) Uᵀ) W
        return cored(weight, params["U"], (self.alpha * params["dS"]).diag()), weight.bias
