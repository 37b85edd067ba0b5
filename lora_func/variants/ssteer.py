"""S-steer: steering along singular directions, without training. After wassname's
ssteer-eval-aware.

    z = (base_out - b) U,    out = base_out + alpha (dS * z) Uᵀ    ( = S_r scaled by 1 + alpha dS )

    dS = normalized( (Uᵀ h) * sqrt(S) ),   h = mean output on positive - on negative prompts

U [d_out, r] and S are the top singular triplets of W. Nothing is trained: h comes in as the stats
of each layer, the difference of two collections,

    positive, negative = (lf.collect(model, targets, b, lf.OutputMeans()) for b in (good, bad))
    stats = {path: positive[path] - negative[path] for path in positive}
    adapter, params = lf.adapt(model, lf.SSteer(), targets=targets, stats=stats)

`alpha` may change at inference: `adapter.replace(alpha=-4.0)` steers the other way, and 0 is the
base output to the bit. The weight is read once, at init.

The definition has a gap: an SVD leaves the signs of u_i and v_i open together, and dS_i takes the
sign of u_i. So another SVD, such as that of a GPU, may steer other directions the other way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..checks import check_fits, check_number, check_rank
from ..errors import LoraFuncError
from ..linalg import top_svd
from ..statistics import OutputMeans
from ..variant import Params
from ._directions import Directions


@dataclass(frozen=True, kw_only=True)
class SSteer(Directions):
    """Steering of singular directions, wassname 2025 (github.com/wassname/ssteer-eval-aware).

    Trainable: nothing.
    """

    card = Card(
        title="Steering of singular directions",
        authors="wassname 2025",
        source="github.com/wassname/ssteer-eval-aware",
        formula="base_out + alpha (dS z) Uᵀ, z = (base_out - b) U",
        at_init="moved",
        reads="init",
        data="required",
        beside_peft="not in PEFT",
    )

    r: int = 64
    """Number of singular directions, from 1 to min(d_in, d_out)."""
    alpha: float = 1.0
    """Strength: any number. It may change at inference; 0 is the base, and a negative one steers
    the other way."""

    def __post_init__(self):
        check_rank(self)
        check_number(self, "alpha")

    def init(self, weight, generator, stats=None):
        if stats is None:
            raise LoraFuncError(
                "SSteer steers along a difference of mean outputs: pass stats={path: positive - "
                "negative}, from two lf.collect(model, targets, batches, lf.OutputMeans())"
            )
        OutputMeans().check(stats, weight)
        check_fits(self, weight.shape)
        U, S, _ = top_svd(weight.dense(), self.r)
        dS = (stats.to(U) @ U) * S.sqrt()  # [r]
        if not dS.norm() > 0:
            raise LoraFuncError(
                "SSteer steers along a difference of mean outputs; this one is 0 or not finite"
            )
        return Params({}, frozen={"U": U, "dS": dS / dS.norm()})

    def like(self, weight, leaves):
        frozen = {"U": torch.empty(weight.shape[0], self.r), "dS": torch.empty(self.r)}
        return Params({}, frozen=frozen)

    def core(self, params):
        return {"U": params["U"], "gain": self.alpha * params["dS"]}
