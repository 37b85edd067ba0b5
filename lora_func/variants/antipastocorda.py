"""AntiPaSTO-CorDA: AntiPaSTO's gains in a data-oriented basis. The basis is after Yang et al. 2024,
arXiv 2406.05223.

    out = base_out + (z * ELU(c g)) Uᵀ,    z = (base_out - b) U

    C = E[x xᵀ] + eps I,    U S V = svd(W C^(1/2)),    U_r = U[:, :r]

C is the uncentred second moment of the layer's inputs. The top r directions lose least of W x in
mean square over the data. U is the eigenbasis of E[(y - b)(y - b)ᵀ] + eps W Wᵀ: up to eps, the
uncentred principal components of the layer's outputs. (CorDA itself, and PEFT, take C and not its
root, which gives another basis.) g = 0 gives the base output to the bit. At least r tokens are
needed. The anchor g0 = 0 lets `Adapter.init` start anew without data. The weight is read once.

`diagonal` takes the diagonal of C alone: lora-lite's AntiPaSTO-ASVD, after Yuan et al. 2023, arXiv
2312.05821. Then calibration sums d_in numbers and not d_in², nothing but W is decomposed, and one
token is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..checks import check_choice, check_fits, check_positive, needs_data
from ..errors import LoraFuncError
from ..linalg import at_least_float32, matrix_root, top_svd
from ..statistics import InputMoments, check_shape
from ..variant import Params, Statistic
from ._directions import Gains


@dataclass(frozen=True, kw_only=True)
class MeanSquares(Statistic):
    """`E[x²] [d_in]` of each of a layer's inputs."""

    def update(self, state, tokens):
        n, total = (0, 0.0) if state is None else state
        return n + len(tokens), total + at_least_float32(tokens).square().sum(0)

    def finalize(self, states):
        return {path: state[1] / state[0] for path, state in states.items() if state is not None}

    def check(self, stats, weight):
        check_shape(self, stats, weight.shape[1:])


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOCorDA(Gains):
    """Gains of data-oriented directions, Clark 2026 (arXiv 2601.07473).

    Trainable: g [r].
    """

    card = Card(
        title="Gains of data-oriented directions",
        authors="Clark 2026",
        source="2601.07473",
        formula="base_out + (z ELU(c g)) Uᵀ, z = (base_out - b) U",
        trainable={"g": "r"},
        reads="init",
        data="required",
        lr=1e-1,
        width=8,
        beside_peft="not in PEFT, whose CorDA has another basis",
    )

    cov_eps: float = 1e-3
    """eps, added to the eigenvalues of the second moment, above 0. With `diagonal`, to its
    entries."""
    diagonal: bool = False
    """Take the diagonal of the second moment alone."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "cov_eps")
        check_choice(self, "diagonal", (False, True))

    @property
    def statistic(self):
        return MeanSquares() if self.diagonal else InputMoments()

    def init(self, weight, generator, stats=None):
        if stats is None:
            raise needs_data(self, "the second moment of its inputs")
        check_fits(self, weight.shape)
        W = at_least_float32(weight.dense())
        U, _, _ = top_svd(self.oriented(W, stats), self.r)
        g = torch.zeros(self.r, dtype=torch.float32)
        return Params({"g": g}, frozen={"U": U, "g0": U.new_zeros(self.r)})

    def oriented(self, W, stats):
        """W C^(1/2)"""
        if self.diagonal:
            return W * (stats + self.cov_eps).sqrt().to(W.device)
        if stats.n < self.r:
            raise LoraFuncError(
                f"AntiPaSTOCorDA(r={self.r}) needs at least {self.r} calibration tokens, and got "
                f"{stats.n}"
            )
        return W @ matrix_root(stats.about(0), self.cov_eps).to(W.device)

    def like(self, weight, leaves):
        g = torch.empty(self.r)
        return Params({"g": g}, frozen={"U": torch.empty(weight.shape[0], self.r), "g0": g})
