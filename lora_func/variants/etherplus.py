"""ETHER+: pairs of reflections that weaken each other, on both sides of the weight.
Bini et al. 2024, arXiv 2405.20271.

    H = blockdiag(I - û_i û_iᵀ + v̂_i v̂_iᵀ),  û = u / |u|,  v̂ = v / |v|
    x' = x H_in,    out = b + (base layer of x' - b) H_out                    W_eff = H_out W H_in

Each side has vectors u and v for n blocks, `[n, d_in / n]` and `[n, d_out / n]`. H need not be
orthogonal, but its distance from the identity is at most 2 sqrt(n). u = v makes it the identity, so
v starts at u, drawn Kaiming-uniform. (The authors' code starts at v = -u, the same H.) With the
vectors as rows of block-diagonal V and U [n, d],

    H - I = Vᵀ V - Uᵀ U = (V - U)ᵀ V + Uᵀ (V - U)

where each term has a factor that is exactly zero: the output at init is the base output to the bit.
The gradients of u and v are opposite there, so the first step separates them. The bias stays, as in
the paper. Nothing of the weight is read. n does not change how many numbers are trained; the paper
takes n = 32 for Llama-2-7B, of width 4096. The code of the authors and weight decay: see ETHER.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..checks import check_rank
from ..linalg import at_least_float32, kaiming, low_rank_difference, low_rank_update
from ..variant import Params
from ._low_rank import Factored
from .ether import check_blocks, normals


@dataclass(frozen=True, kw_only=True)
class ETHERPlus(Factored):
    """Pairs of reflections on both sides, Bini et al. 2024 (arXiv 2405.20271).

    Trainable: u_in, v_in [n, d_in / n], u_out, v_out [n, d_out / n].
    """

    card = Card(
        title="Pairs of reflections on both sides",
        authors="Bini et al. 2024",
        source="2405.20271",
        formula="(base layer of x H_in) H_out, H = blockdiag(I - û ûᵀ + v̂ v̂ᵀ)",
        trainable={
            "u_in": "n, d_in // n",
            "v_in": "n, d_in // n",
            "u_out": "n, d_out // n",
            "v_out": "n, d_out // n",
        },
        reads="nothing",
        lr=5e-3,
    )
    broadcasts = prepares_together = True

    n: int = 4
    """Number of blocks on each side, at least 1; divides d_in and d_out into blocks of at least
    2."""

    def __post_init__(self):
        check_rank(self, "n")

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        check_blocks(self, d_in, "inputs")
        check_blocks(self, d_out, "outputs")
        u_in, u_out = (kaiming(self.n, d // self.n, generator) for d in (d_in, d_out))
        return Params({"u_in": u_in, "v_in": u_in.clone(), "u_out": u_out, "v_out": u_out.clone()})

    def side(self, params, name):
        """A and B with H - I = B A, `[2 n, d]` and `[d, 2 n]`."""
        U, V = normals(params[f"u_{name}"]), normals(params[f"v_{name}"])
        return low_rank_difference(V, V.mT, U, U.mT)

    def prepare(self, weight, params, dtype):
        A_in, B_in = self.side(params, "in")
        A_out, B_out = self.side(params, "out")
        p = {"A_in": A_in, "B_in": B_in, "A_out": A_out, "B_out": B_out}
        if weight is not None and weight.bias is not None:
            p["b"] = weight.bias
        return {name: t.to(dtype) for name, t in p.items()}

    def transform_input(self, x, params):
        p = self.prepared(None, params, x.dtype)
        return low_rank_update(x, x, p["A_in"], p["B_in"])

    def apply(self, x, base_out, weight, params):
        p = self.prepared(weight, params, base_out.dtype)
        y = base_out - p["b"].to(base_out.dtype) if "b" in p else base_out
        return low_rank_update(base_out, y, p["A_out"], p["B_out"])

    def factors(self, weight, params):
        # W_eff = V + B_out (A_out V)  with  V = W + (W B_in) A_in
        A, B = self.side(params, "in")
        A_out, B_out = self.side(params, "out")
        W = at_least_float32(weight.dense()).to(A.dtype)
        V = W + (W @ B) @ A
        return torch.cat([A, A_out @ V]), torch.cat([W @ B, B_out], dim=1)
