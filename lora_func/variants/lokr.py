"""LoKr: the Kronecker product of two small matrices. Yeh et al. 2023, arXiv 2309.14859 (LyCORIS).

    out = base_out + s x (w1 ⊗ w2)ᵀ          s = alpha / r

d_out = l k and d_in = m n, w1 [l, m], w2 [k, n]. With x as a matrix X [m, n], the update is the
matrix w1 X w2ᵀ [l, k]: the Kronecker product is never formed. A factor that is large beside r is
itself a product of rank r: w2 = w2a w2b if r < max(k, n) / 2, and with `decompose_both`
w1 = w1a w1b if r < max(l, m) / 2. So a layer has w1, or w1a and w1b; and w2, or w2a and w2b. As in
PEFT, s divides by r even where no factor has this rank.

w1, or w1a, starts at zero, so the output at init is the base output to the bit, and w1 alone has a
gradient there. The rank of the update is rank(w1) rank(w2). l and m are `decompose_factor` where it
divides the size, and otherwise its largest divisor up to `decompose_factor` and the square root: 1
for a prime. This is PEFT's rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..card import Card, Peft
from ..checks import check_choice, check_positive, check_rank
from ..linalg import at_least_float32, kaiming
from ..variant import Params, Variant
from ._blocks import divisor


@dataclass(frozen=True, kw_only=True)
class LoKr(Variant):
    """Low-rank Kronecker product, Yeh et al. 2023 (arXiv 2309.14859).

    Trainable: w1 [l, m] or w1a [l, r] and w1b [r, m]; w2 [k, n] or w2a [k, r] and w2b [r, n].
    """

    card = Card(
        title="Kronecker product of two small matrices",
        authors="Yeh et al. 2023",
        source="2309.14859",
        formula="base_out + s x (w1 ⊗ w2)ᵀ",
        trainable={
            "w1": "outer(d_out), outer(d_in) if whole1(d_out, d_in) else None",
            "w1a": "outer(d_out), r if not whole1(d_out, d_in) else None",
            "w1b": "r, outer(d_in) if not whole1(d_out, d_in) else None",
            "w2": "inner(d_out), inner(d_in) if whole2(d_out, d_in) else None",
            "w2a": "inner(d_out), r if not whole2(d_out, d_in) else None",
            "w2b": "r, inner(d_in) if not whole2(d_out, d_in) else None",
        },
        reads="nothing",
        lr=0.03,
        peft=Peft("LoKrConfig"),
        beside_peft="the same function; PEFT forms the dense update",
    )
    prepares_together = True

    r: int = 8
    """Rank of a factor that is large beside it, at least 1."""
    alpha: float = 8.0
    """Numerator of the scale s = alpha / r of the update, above 0."""
    decompose_factor: int | None = None
    """l and m, the sides of w1, where it divides the size of the layer, and otherwise a limit of
    both, besides the square root of the size: at least 1. None: no other limit."""
    decompose_both: bool = False
    """w1, too, may be a product of rank r. False: w2 alone."""

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")
        if self.decompose_factor is not None:
            check_rank(self, "decompose_factor")
        check_choice(self, "decompose_both", (False, True))

    def outer(self, d: int) -> int:
        """l of d_out, or m of d_in: the side of w1."""
        return divisor(d, self.decompose_factor)

    def inner(self, d: int) -> int:
        """k of d_out, or n of d_in: the side of w2."""
        return d // self.outer(d)

    def whole1(self, d_out: int, d_in: int) -> bool:
        """Whether w1 is one leaf, and not the product of w1a and w1b."""
        return not self.decompose_both or 2 * self.r >= max(self.outer(d_out), self.outer(d_in))

    def whole2(self, d_out: int, d_in: int) -> bool:
        """Whether w2 is one leaf, and not the product of w2a and w2b."""
        return 2 * self.r >= max(self.inner(d_out), self.inner(d_in))

    def init(self, weight, generator, stats=None):
        shapes = self.card.shapes(self, weight.shape)
        zero = "w1" if "w1" in shapes else "w1a"
        leaves = {name: kaiming(a, b, generator) for name, (a, b) in shapes.items()}
        return Params({**leaves, zero: torch.zeros(shapes[zero], dtype=torch.float32)})

    def prepare(self, weight, params, dtype):
        p = dict(params)
        w1 = p.pop("w1") if "w1" in p else p.pop("w1a") @ p.pop("w1b")
        return {name: t.to(dtype) for name, t in {"w1": self.alpha / self.r * w1, **p}.items()}

    def apply(self, x, base_out, weight, params):
        p = {n: t.to(x.dtype) for n, t in self.prepared(weight, params, x.dtype).items()}
        d_in = x.shape[-1]
        X = x.unflatten(-1, (self.outer(d_in), self.inner(d_in)))
        X = F.linear(X, p["w2"] if "w2" in p else p["w2b"])  # [.., m, k or r]
        # Laid out anew: the last bits of the product of a view depend on whether it requires grad.
        X = F.linear(X.mT.contiguous(), p["w1"]).mT.contiguous()  # [.., l, k or r]
        if "w2a" in p:
            X = F.linear(X, p["w2a"])
        return base_out + X.flatten(-2).to(base_out.dtype)

    def merged(self, weight, params):
        # W + s w1 ⊗ w2
        W = at_least_float32(weight.dense())
        p = self.prepare(weight, params, W.dtype)
        w2 = p["w2"] if "w2" in p else p["w2a"] @ p["w2b"]
        return W + torch.kron(p["w1"], w2), weight.bias
