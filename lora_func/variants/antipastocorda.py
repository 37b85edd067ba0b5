"""AntiPaSTO-CorDA: AntiPaSTO's gains in a data-oriented basis. The basis is after Yang et al. 2024,
arXiv 2406.05223.

    out = base_out + (z * ELU(c g)) Uᵀ,    z = (base_out - b) U

    C = E[x xᵀ] + eps I,    U S V = svd(W C^(1/2)),    U_r = U[:, :r]

C is the uncentred second moment of the layer's inputs. The top r directions lose least of W x in
mean square over the data. U is the eigenbasis of E[(y - b)(y - b)ᵀ] + eps W Wᵀ: up to eps, the
uncentred principal components of the layer's outputs. (CorDA itself, and PEFT, take C and not its
root, which gives another basis.) g = 0 gives the base output to the bit. At least r tokens are
needed. The anchor g0 = 0 lets `Adapter.init` start anew without data. The weight is read once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..checks import check_fits, check_positive, needs_data
from ..errors import LoraFuncError
from ..linalg import at_least_float32, matrix_root
from ..statistics import InputMoments
from ..variant import Params
from ._directions import Gains


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

    cov_eps: float = 1e-3  # added to the eigenvalues of the second moment, above 0

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "cov_eps")

    @property
    def statistic(self):
        return InputMoments()

    def init(self, weight, generator, stats=None):
        if stats is None:
            raise needs_data(self, "the second moment of its inputs")
        check_fits(self, weight.shape)
        if stats.n < self.r:
            raise LoraFuncError(
                f"AntiPaSTOCorDA(r={self.r}) needs at least {self.r} calibration tokens, and got "
                f"{stats.n}"
            )
        root = matrix_root(stats.about(0), self.cov_eps).to(weight.device)
        W = at_least_float32(weight.dense())
        U, _, _ = torch.linalg.svd(W @ root, full_matrices=False)
        g = torch.zeros(self.r, dtype=torch.float32)
        return Params({"g": g}, frozen={"U": U[:, : self.r], "g0": U.new_zeros(self.r)})

    def like(self, weight, leaves):
        g = torch.empty(self.r)
        return Params({"g": g}, frozen={"U": torch.empty(weight.shape[0], self.r), "g0": g})
