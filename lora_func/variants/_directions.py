"""Families of variants that act along directions of the output, `[d_out, k]`.

For left singular vectors U of W, Uᵀ W x = S (V x). So what a method does to the singular values
and vectors of W can act on the output alone, without S, V or x, and the base keeps its weight.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_fits, check_number, check_rank
from ..linalg import at_least_float32, top_svd
from ..variant import Variant
from ._low_rank import Factored


@dataclass(frozen=True, kw_only=True)
class Directions(Factored):
    """`out = base_out + act(z) Uᵀ` with the coordinates `z = (base_out - b) U`, `[.., k]`."""

    prepares_together = True

    @abc.abstractmethod
    def core(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """U `[d_out, k]`, and what `act` needs, as a dict."""

    def act(self, z, p):
        """What is added along the directions, `[.., k]`: z times a gain for each of them."""
        return z * p["gain"].to(z.dtype)

    def prepare(self, weight, params, dtype):
        p = {name: t.to(dtype) for name, t in self.core(params).items()}
        return p if weight.bias is None else {**p, "b": weight.bias.to(dtype)}

    def apply(self, x, base_out, weight, params):
        p = self.prepared(weight, params, base_out.dtype)
        U = p["U"].to(base_out.dtype)
        z = (base_out - p["b"].to(base_out.dtype) if "b" in p else base_out) @ U  # [.., k]
        return base_out + F.linear(self.act(z, p), U).to(base_out.dtype)

    def factors(self, weight, params):
        # W_eff = W + U act(Wᵀ U)ᵀ
        W = at_least_float32(weight.dense())
        p = {name: t.to(W.dtype) for name, t in self.core(params).items()}
        return self.act(W.mT @ p["U"], p).mT, p["U"]


@dataclass(frozen=True, kw_only=True)
class Gain(Variant):
    """The hyperparameters of a learned gain 1 + ELU(coeff g) > 0 for each of r directions."""

    r: int = 256
    """Number of directions, from 1 to min(d_in, d_out)."""
    coeff: float = 1.0
    """c, factor of g in the gain 1 + ELU(c g): any number. It may change at inference; 0 is the
    base."""
    suppress_only: bool = False
    """Clamp g at 0 from above, so that no gain exceeds 1 for coeff >= 0."""

    def __post_init__(self):
        check_rank(self)
        check_number(self, "coeff")
        check_choice(self, "suppress_only", (False, True))

    def gain(self, g):
        """`ELU(coeff g)`: how far the gains are from 1."""
        return F.elu(self.coeff * (g.clamp(max=0) if self.suppress_only else g))


@dataclass(frozen=True, kw_only=True)
class Gains(Gain, Directions):
    """These gains, and nothing else."""

    def core(self, params):
        return {"U": params["U"], "gain": self.gain(params["g"])}


@dataclass(frozen=True, kw_only=True)
class Turned(Factored):
    """`out = base_out + act(p) Uᵀ` with the coordinates `p = x Vᵀ`, `[.., r]`."""

    prepares_together = True

    @abc.abstractmethod
    def core(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `act` needs, as a dict."""

    @abc.abstractmethod
    def act(self, p: Tensor, core: dict[str, Tensor]) -> Tensor:
        """What is added along U, `[.., r]`. Linear in p."""

    def prepare(self, weight, params, dtype):
        both = {"U": params["U"], "V": params["V"], "S": params["S"], **self.core(params)}
        return {name: t.to(dtype) for name, t in both.items()}

    def apply(self, x, base_out, weight, params):
        core = self.prepared(weight, params, x.dtype)
        moved = self.act(F.linear(x, core["V"].to(x.dtype)), core)  # [.., r]
        return base_out + F.linear(moved, core["U"].to(moved.dtype)).to(base_out.dtype)

    def factors(self, weight, params):
        # W_eff = W + U act(Vᵀ)ᵀ
        core = self.prepare(weight, params, at_least_float32(params["U"]).dtype)
        return self.act(core["V"].mT, core).mT, core["U"]


def strongest(scores, r):
    """Indices of the r highest scores, ascending; without scores, of the first r."""
    return torch.arange(r) if scores is None else scores.topk(r).indices.sort().values


def strongest_svd(variant, weight, scores):
    """U, S, V of the r triplets with the highest scores, or of the largest without scores."""
    check_fits(variant, weight.shape)
    U, S, V = top_svd(weight.dense(), variant.r if scores is None else min(weight.shape))
    kept = strongest(scores, variant.r).to(U.device)
    return U[:, kept], S[kept], V[kept]
