"""ETHER: a reflection of the input. Bini et al. 2024, arXiv 2405.20271.

    x' = x H,    H = blockdiag(I - 2 û_i û_iᵀ),  û = u / |u|,    out = base layer of x'

u [n, d_in / n] holds a vector for each of n blocks, drawn Kaiming-uniform as in the authors' code.
H is a reflection: its distance from the identity is 2 sqrt(n), whatever u is. That bounds what
training can do, and makes high learning rates safe. But no u makes H the identity, so the output at
init is not the base output. It is farther from it the more blocks there are: by default there is
one, the paper's first form. (For Llama-2-7B, of width 4096, the paper has n = 32.)

With the û_i as the rows of a block-diagonal A [n, d_in], x H = x - 2 (x Aᵀ) A: one low-rank update.
Nothing of the weight is read. For n > 1 the authors' code reshapes W by rows, so that a block
reflects other entries than in the paper. This file follows the paper, and so does its learning
rate. Weight decay has no effect on H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..checks import check_rank
from ..errors import LoraFuncError
from ..linalg import at_least_float32, kaiming, low_rank_update
from ..variant import Params, Variant
from ._low_rank import Factored

EPS = 1e-6  # the shortest vector that is normalized


@dataclass(frozen=True, kw_only=True)
class ETHER(Factored):
    """A reflection of the input, Bini et al. 2024 (arXiv 2405.20271).

    Trainable: u [n, d_in / n].
    """

    card = Card(
        title="A reflection of the input",
        authors="Bini et al. 2024",
        source="2405.20271",
        formula="base layer of x blockdiag(I - 2 û ûᵀ)",
        trainable={"u": "n, d_in // n"},
        at_init="moved",
        reads="nothing",
        lr=2e-3,
    )
    broadcasts = prepares_together = True

    n: int = 1
    """Number of blocks, at least 1; divides d_in into blocks of at least 2 inputs."""

    def __post_init__(self):
        check_rank(self, "n")

    def init(self, weight, generator, stats=None):
        d_in = weight.shape[1]
        check_blocks(self, d_in, "inputs")
        return Params({"u": kaiming(self.n, d_in // self.n, generator)})

    def prepare(self, weight, params, dtype):
        A = normals(params["u"])
        return {"A": A.to(dtype), "B": (-2 * A.mT).to(dtype)}

    def transform_input(self, x, params):
        p = self.prepared(None, params, x.dtype)
        return low_rank_update(x, x, p["A"], p["B"])

    def factors(self, weight, params):
        # W_eff = W H = W - 2 (W Aᵀ) A
        W, A = at_least_float32(weight.dense()), normals(params["u"])
        return A, -2 * W.to(A.dtype) @ A.mT


def normals(u):
    """The vectors `u [n, k]`, with unit length, as the rows of a block-diagonal `[n, n k]`."""
    u = at_least_float32(u)
    u = u / u.norm(dim=-1, keepdim=True).clamp(min=EPS)
    blocks = torch.eye(len(u), dtype=u.dtype, device=u.device)
    return (blocks[:, :, None] * u).flatten(1)


def check_blocks(variant: Variant, width: int, what: str) -> None:
    """Raises LoraFuncError unless n blocks of 2 or more make up a layer's inputs or outputs."""
    n = variant.n  # pyright: ignore
    if width % n or width < 2 * n:
        raise LoraFuncError(
            f"{variant} on a layer with {width} {what}: n must divide them into blocks of at "
            "least 2"
        )
