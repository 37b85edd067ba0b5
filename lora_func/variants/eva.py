"""EVA: LoRA that starts from the principal components of its inputs, with a rank for each layer. Paischer et al. 2024,
arXiv 2410.07170.

    out = base_out + s (x Aᵀ) Bᵀ                                                        s = alpha / r, for every rank

A [r_l, d_in] holds the first r_l principal directions of the layer's calibration tokens, B is zero: the output at init is
the base output to the bit. A layer offers up to round(rho r) components; of all of them the r x (number of layers) with
the largest share of their layer's variance are taken, so r_l is how many of its own a layer has among these; with rho = 1
all ranks are r. A layer left with none drops out. The update is scaled by alpha / r whatever r_l, which is what PEFT's
adjusted alpha_l = alpha r_l / r comes to. The components are exact: moments are summed up and decomposed once, where PEFT
runs an incremental SVD. `center=False` takes the uncentred second moment, whose first direction is mostly the mean
(lora-lite's form, and what its "ActSVD" sketch comes to). The weight itself is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..calibrate import InputMoments
from ..numerics import at_least_float32, low_rank_update, needs_data
from ..variant import Params, Variant, check_choice, check_positive, check_rank


class Components(NamedTuple):
    """The principal components that a layer was given: unit directions `[r_l, d]`, and the singular values of its tokens."""

    directions: Tensor
    singular_values: Tensor


@dataclass(frozen=True, kw_only=True)
class PrincipalComponents(InputMoments):
    """The `Components` of every layer, with ranks that together come to r for each."""

    r: int
    rho: float
    center: bool

    def finalize(self, states):
        seen = {path: state for path, state in states.items() if state is not None}
        decomposed = {id(state): self.components(state) for state in {id(state): state for state in seen.values()}.values()}
        own = {path: decomposed[id(state)] for path, state in seen.items()}
        shares = [(share.item(), path) for path, (_, shares) in own.items() for share in shares]
        taken = sorted(shares, key=lambda entry: -entry[0])[: self.r * len(own)]
        ranks = {path: sum(owner == path for _, owner in taken) for path in own}
        return {path: Components(*(part[: ranks[path]] for part in components)) for path, (components, _) in own.items()}

    def components(self, moments):
        """The first round(rho r) components of the tokens, or all that they have, and their shares of the variance."""
        C = moments.covariance if self.center else moments.about(0)
        values, vectors = torch.linalg.eigh(C)  # ascending
        values = values.flip(0).clamp(min=0)
        rank = int((values > values[0] * len(C) * torch.finfo(C.dtype).eps).sum())  # the rest is rounding
        count = min(round(self.rho * self.r), rank)
        directions = vectors.mT.flip(0)[:count]
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        directions = directions * largest.sign()  # the sign is free: the largest entry is positive
        return (directions, (values[:count] * moments.n).sqrt()), values[:count] / values.sum()


@dataclass(frozen=True, kw_only=True)
class EVA(Variant):
    """Explained-variance adaptation, Paischer et al. 2024 (arXiv 2410.07170). Trainable: A [r_l, d_in], B [d_out, r_l]."""

    r: int = 8  # mean rank, at least 1
    alpha: float = 16.0  # scale of the update before the division by r, above 0
    rho: float = 2.0  # a layer's rank is at most round(rho r); 1: the same rank everywhere
    center: bool = True  # components of the covariance; False: of the uncentred second moment
    whiten: bool = False  # divide each direction by the root of its singular value, as in PEFT
    lr_ratio: float = 1.0  # B learns so many times faster than A (LoRA+, see LoRA); above 0

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")
        check_positive(self, "rho")
        check_choice(self, "center", (False, True))
        check_choice(self, "whiten", (False, True))
        check_positive(self, "lr_ratio")

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    @property
    def lr_scale(self):
        return {"B": self.lr_ratio}

    @property
    def statistic(self):
        return PrincipalComponents(r=self.r, rho=self.rho, center=self.center)

    def init(self, weight, generator, stats=None):
        if stats is None:
            raise needs_data(self, "the principal components of its inputs")
        A, singular_values = stats
        if not len(A):
            return Params({})
        if self.whiten:
            A = A / singular_values.sqrt()[:, None]
        return Params({"A": A.clone(), "B": A.new_zeros(weight.shape[0], len(A))})

    def like(self, weight, leaves):
        d_out, d_in = weight.shape
        r = len(leaves["A"]) if "A" in leaves else self.r
        return Params({"A": torch.empty(r, d_in), "B": torch.empty(d_out, r)})

    def apply(self, x, base_out, weight, params):
        return low_rank_update(base_out, x, params["A"], params["B"], self.scale)

    def merged(self, weight, params):
        # W + s B A
        return at_least_float32(weight.dense()) + self.scale * params["B"] @ params["A"], weight.bias
