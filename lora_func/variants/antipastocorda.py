"""AntiPaSTO-CorDA: AntiPaSTO's gains in a basis oriented by the data. The basis after Yang et al. 2024, arXiv 2406.05223.

    out = base_out + (z * ELU(c g)) Uᵀ,    z = (base_out - b) U

    C = E[x xᵀ] + eps I,    U S V = svd(W C^(1/2)),    U_r = U[:, :r]

C is the uncentred second moment of the layer's inputs. The top r directions lose least of W x in the mean square over the
data, and U is the eigenbasis of E[(y - b)(y - b)ᵀ] + eps W Wᵀ: up to eps, the uncentred principal components of the layer's
own outputs. (CorDA itself, and PEFT, take the full C and not its root: another basis.) The gain is AntiPaSTO's; g = 0 gives
the base output to the bit. It takes at least r tokens. The anchor g0 = 0 lets `Adapter.init` start anew without data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..calibrate import InputMoments
from ..errors import LoraFuncError
from ..numerics import add_along, at_least_float32, check_fits, coordinates, cored, gain, matrix_roots, needs_data
from ..variant import Params, Variant, check_choice, check_number, check_positive, check_rank


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOCorDA(Variant):
    """Gains of data-oriented directions, Clark 2026 (arXiv 2601.07473). Trainable: g [r]."""

    r: int = 256  # directions, from 1 to min(d_in, d_out)
    coeff: float = 1.0  # factor of g, any number; may change at inference
    suppress_only: bool = False  # clamp g at 0 from above, so that no gain exceeds 1 for coeff >= 0
    cov_eps: float = 1e-3  # added to the eigenvalues of the second moment, above 0

    def __post_init__(self):
        check_rank(self)
        check_number(self, "coeff")
        check_choice(self, "suppress_only", (False, True))
        check_positive(self, "cov_eps")

    @property
    def statistic(self):
        return InputMoments()

    def init(self, weight, generator, stats=None):
        if stats is None:
            raise needs_data(self, "the second moment of its inputs")
        check_fits("AntiPaSTOCorDA", self.r, weight.shape)
        if stats.n < self.r:
            raise LoraFuncError(f"AntiPaSTOCorDA(r={self.r}) needs at least {self.r} calibration tokens, and got {stats.n}")
        root, _ = matrix_roots(stats.about(0), self.cov_eps)
        U, _, _ = torch.linalg.svd(at_least_float32(weight.dense()) @ root.to(weight.device), full_matrices=False)
        return Params({"g": torch.zeros(self.r)}, frozen={"U": U[:, : self.r], "g0": U.new_zeros(self.r)})

    def like(self, weight, leaves):
        return Params({"g": torch.empty(self.r)}, frozen={"U": torch.empty(weight.shape[0], self.r), "g0": torch.empty(self.r)})

    def apply(self, x, base_out, weight, params):
        z = coordinates(base_out, weight.bias, params["U"])  # [.., r]
        return add_along(base_out, z * gain(params["g"], self.coeff, self.suppress_only).to(z.dtype), params["U"])

    def merged(self, weight, params):
        # (I + U diag(ELU(c g)) Uᵀ) W
        return cored(weight, params["U"], gain(params["g"], self.coeff, self.suppress_only).diag()), weight.bias
