"""GraLoRA: a LoRA for each of k x k blocks of the weight. Jung et al. 2025, arXiv 2505.20355.

    out_j = base_out_j + s Σ_n (x_n A_nj) B_nj                s = alpha / (r + hybrid_r)

x_n and out_j are the k parts of the input and the output, so k divides d_in, d_out and r. Block
(j, n) has factors of rank r / k: A_nj [d_in / k, r / k], columns j of A_n, and B_nj
[r / k, d_out / k], rows n of B_j. All together they have as many numbers as a LoRA of rank r, which
is k = 1, and an update of rank k r. `hybrid_r` adds a plain LoRA of that rank. A is Kaiming-uniform
and B zero, so the output at init is the base output to the bit. r, alpha and k are PEFT's defaults.

Each token passes two stacks of k small products, as many operations as in a LoRA of rank r. Between
them, the hidden numbers of a part of the input go to the parts of the output. `factors` has the
blocks as one low-rank product, of rank k r, with zeros between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_positive, check_rank
from ..errors import LoraFuncError
from ..linalg import kaiming, low_rank_update, times
from ..variant import Params
from ._blocks import check_divides
from ._low_rank import Product


@dataclass(frozen=True, kw_only=True)
class GraLoRA(Product):
    """Granular low-rank adaptation, Jung et al. 2025 (arXiv 2505.20355).

    Trainable: A [k, d_in / k, r], B [k, r, d_out / k]; with hybrid_r A_h [hybrid_r, d_in] and
    B_h [d_out, hybrid_r].
    """

    card = Card(
        title="A LoRA for each of k x k blocks",
        authors="Jung et al. 2025",
        source="2505.20355",
        formula="base_out_j + s Σ_n (x_n A_nj) B_nj",
        trainable={
            "A": "k, d_in // k, r",
            "B": "k, r, d_out // k",
            "A_h": "hybrid_r, d_in if hybrid_r else None",
            "B_h": "d_out, hybrid_r if hybrid_r else None",
        },
        reads="nothing",
        lr=2e-3,
        peft=Peft("GraloraConfig"),
        beside_peft="the same function",
    )

    r: int = 32
    """A layer has as many numbers as a LoRA of this rank; a multiple of k. Each block has the rank
    r / k."""
    alpha: float = 64.0
    """Numerator of the scale s = alpha / (r + hybrid_r) of the update, above 0."""
    k: int = 2
    """Number of parts of the input and of the output, at least 1; divides d_in, d_out and r. 1 is
    LoRA."""
    hybrid_r: int = 0
    """Rank of a plain LoRA that is added, at least 0."""

    def __post_init__(self):
        check_rank(self)
        check_positive(self, "alpha")
        check_rank(self, "k")
        if self.hybrid_r != 0:
            check_rank(self, "hybrid_r")
        if self.r % self.k:
            below, above = self.r // self.k * self.k, -(-self.r // self.k) * self.k
            raise LoraFuncError(
                f"GraLoRA(r={self.r}, k={self.k}): r must be a multiple of k, such as "
                f"{below or above}"
            )

    @property
    def scale(self):
        return self.alpha / (self.r + self.hybrid_r)

    def init(self, weight, generator, stats=None):
        check_divides(self, "k", weight.shape)
        (d_out, d_in), k, r = weight.shape, self.k, self.r
        A = torch.stack([kaiming(r, d_in // k, generator).mT for _ in range(k)])
        leaves = {"A": A, "B": torch.zeros(k, r, d_out // k, dtype=torch.float32)}
        if self.hybrid_r:
            leaves["A_h"] = kaiming(self.hybrid_r, d_in, generator)
            leaves["B_h"] = torch.zeros(d_out, self.hybrid_r, dtype=torch.float32)
        return Params(leaves)

    def prepare(self, weight, params, dtype):
        scaled = {n: times(self.scale, leaf) for n, leaf in params.items() if n[0] == "B"}
        return {name: leaf.to(dtype) for name, leaf in {**params, **scaled}.items()}

    def apply(self, x, base_out, weight, params):
        p, parts = self.prepared(weight, params, x.dtype), (self.k, -1)
        h = torch.einsum("...ni,nir->...nr", x.unflatten(-1, parts), p["A"].to(x.dtype))
        h = h.unflatten(-1, parts).transpose(-3, -2).flatten(-2)  # [.., j, r]
        delta = torch.einsum("...jr,jro->...jo", h, p["B"].to(x.dtype)).to(base_out.dtype)
        # The sum is laid out as the output, but the product as a stack: to flatten it would copy.
        out = (base_out.unflatten(-1, parts) + delta).flatten(-2)
        return low_rank_update(out, x, p["A_h"], p["B_h"]) if self.hybrid_r else out

    def pair(self, params):
        A, B, k = params["A"], params["B"], self.k
        one = torch.eye(k, dtype=A.dtype, device=A.device)
        rows = torch.einsum("nir,nm->nrmi", A, one)  # [k, r, k, d_in / k]
        cols = torch.einsum("jnso,jm->jonms", B.unflatten(1, (k, -1)), one)
        A, B = rows.flatten(2).flatten(0, 1), cols.flatten(2).flatten(0, 1)  # [k r, i], [o, k r]
        if not self.hybrid_r:
            return A, B
        return torch.cat([A, params["A_h"]]), torch.cat([B, params["B_h"]], dim=1)
