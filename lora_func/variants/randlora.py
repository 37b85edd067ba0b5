"""RandLoRA: a sum of random bases, of full rank, with trained scales. Albert et al. 2025,
arXiv 2502.00987.

    out = base_out + s x Δᵀ,    Δ = B S,    S_ij = lam_ij (A_i ∘ gam_j)          s = alpha / r

d is the smaller and D the larger size of the layer, and n = ceil(d / r) the number of bases, so
that r n >= d and the rank of Δ is not limited. S [r n, d] has a row for each i < r and j < n; B is
[D, r n]. In a layer that narrows, Δ is the transpose. A [r, 1, largest d] and B [largest D, largest
n, r] are random constants of variance 1, one pair for all layers, and each layer slices what it
needs. Training moves lam [r, n], which starts at zero, and gam [n, d], which starts at 1 / d. So
the output at init is the base output to the bit, and only lam has a gradient there.

The paper pairs basis j of B with lam and gam of basis j. PEFT flattens B with j before i, and S
with i before j. For random columns of B this is another order of the same; this file has PEFT's, so
that parameters mean the same there. r and alpha are PEFT's by default. Its sparse bases are not
here.

Each token costs r n (d_in + d_out), more than in the base layer, as in PEFT. S has about as many
numbers as d², and B as the weight. They are made and cast anew in forward and in backward, which
keeps the input, the constants and the leaves. A token that is decoded alone pays for this: merge
the adapter to decode with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_positive, check_rank
from ..linalg import at_least_float32, uniform
from ..variant import Params, Variant
from ._bases import bases_product, scaled


@dataclass(frozen=True, kw_only=True)
class RandLoRA(Variant):
    """Full-rank sums of random bases, Albert et al. 2025 (arXiv 2502.00987).

    Trainable: lam [r, n], gam [n, min(d_in, d_out)] for n = ceil(min(d_in, d_out) / r).
    """

    card = Card(
        title="Scaled random bases of full rank, shared by all layers",
        authors="Albert et al. 2025",
        source="2502.00987",
        formula="base_out + s x (B S)ᵀ, S_ij = lam_ij (A_i gam_j)",
        trainable={"lam": "r, bases(d_out, d_in)", "gam": "bases(d_out, d_in), least(d_out, d_in)"},
        reads="nothing",
        lr=3e-4,
        peft=Peft("RandLoraConfig"),
        beside_peft="the same function; PEFT draws A and B from a key of its own",
    )

    r: int = 32
    """Rank of a basis, at least 1. The smaller, the more bases n, and the more is trained."""
    alpha: float = 640.0
    """Numerator of the scale s = alpha / r of the update, above 0."""

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")

    def least(self, d_out: int, d_in: int) -> int:
        """d."""
        return min(d_out, d_in)

    def bases(self, d_out: int, d_in: int) -> int:
        """n."""
        return -(-min(d_out, d_in) // self.r)

    def init(self, weight, generator, stats=None):
        n, d = self.bases(*weight.shape), min(weight.shape)
        gam = torch.full((n, d), 1 / d, dtype=torch.float32)
        return Params({"lam": torch.zeros(self.r, n, dtype=torch.float32), "gam": gam})

    def init_shared(self, weights, generator):
        largest = [max(weight.shape[axis] for weight in weights) for axis in (0, 1)]
        A = uniform((self.r, 1, min(largest)), math.sqrt(3), generator)
        B = uniform((max(largest), self.bases(*largest), self.r), math.sqrt(3), generator)
        return Params({}, frozen={"bases_A": A, "bases_B": B})

    def prepare(self, weight, params, dtype):
        n, d, D = self.bases(*weight.shape), min(weight.shape), max(weight.shape)
        wide = torch.promote_types(dtype, torch.float32)
        lam, gam = (params[name].to(wide) for name in ("lam", "gam"))
        A, B = params["bases_A"][:, :, :d], params["bases_B"][:D, :n].flatten(1)
        return {"lam": self.alpha / self.r * lam, "gam": gam, "A": A, "B": B}

    def apply(self, x, base_out, weight, params):
        p, x = self.prepared(weight, params, base_out.dtype), x.to(base_out.dtype)
        widens = weight.shape[0] >= weight.shape[1]
        return base_out + bases_product(x, p["lam"], p["gam"], p["A"], p["B"], widens=widens)

    def merged(self, weight, params):
        # W + s B S, or its transpose
        W = at_least_float32(weight.dense())
        p = self.prepare(weight, params, W.dtype)
        delta = p["B"].to(W.dtype) @ scaled(p["lam"], p["gam"], p["A"].to(W.dtype))
        return W + (delta if W.shape[0] >= W.shape[1] else delta.mT), weight.bias
