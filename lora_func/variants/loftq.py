"""LoftQ: LoRA that starts from what quantization lost. Li et al. 2023, arXiv 2310.08659.

    out = base_out + s (x Aᵀ) Bᵀ          s = alpha / r,  or alpha / sqrt(r) with rslora

    R = W_float - W,   U S V = svd(R),   A = sqrt(S_r / s) V_r [r, d_in],   B = U_r sqrt(S_r / s)

So W + s B A is nearest to the float weight among all changes of rank r: by design, the output at
init moves from that of the quantized model towards that of the float one. W is the layer's own
weight, dequantized and read once, at init. The float ones come in as the stats of the layers:

    stats = {path: float_model.get_submodule(path).weight for path in targets.find(model)}
    adapter, params = lf.adapt(model, lf.LoftQ(r=16), targets=targets, stats=stats)

This is the paper's algorithm with T = 1, and PEFT's `replace_lora_weights_loftq`, which does not
divide s out: there alpha has to be r. More rounds quantize W_float - s B A anew, which changes the
base. Load a base that was made so (or by QPiSSA, from the weight without its principal part), and
the same stats give a start at least as near to the float weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..card import Card, Peft
from ..checks import check_choice, check_fits, check_rank
from ..errors import LoraFuncError
from ..linalg import at_least_float32, top_svd
from ..variant import Params
from ._low_rank import TwoFactors


@dataclass(frozen=True, kw_only=True)
class LoftQ(TwoFactors):
    """LoRA-fine-tuning-aware quantization, Li et al. 2023 (arXiv 2310.08659).

    Trainable: A [r, d_in], B [d_out, r].
    """

    card = Card(
        title="A start that makes up for quantization",
        authors="Li et al. 2023",
        source="2310.08659",
        formula="base_out + s (x Aᵀ) Bᵀ",
        trainable={"A": "r, d_in", "B": "d_out, r"},
        at_init="moved",
        reads="init",
        data="required",
        lr=1e-3,
        peft=Peft("LoraConfig", {"init_lora_weights": "loftq"}),
        beside_peft="one round, as `replace_lora_weights_loftq`, for any alpha and any packing",
    )

    svd: str = "exact"
    """How the difference is decomposed: "exact", or "randomized", which is much faster for a small
    r on a large layer."""
    niter: int = 4
    """Power iterations of the randomized SVD, at least 1; unused by the exact one."""

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "svd", ("exact", "randomized"))
        check_rank(self, "niter")

    def init(self, weight, generator, stats=None):
        check_fits(self, weight.shape)
        niter = self.niter if self.svd == "randomized" else None
        U, S, V = top_svd(lost(weight, stats), self.r, niter, generator)
        root = (S / self.scale).sqrt()  # [r]
        return Params({"A": root[:, None] * V, "B": U * root})

    def like(self, weight, leaves):
        d_out, d_in = weight.shape
        return Params({"A": torch.empty(self.r, d_in), "B": torch.empty(d_out, self.r)})


def lost(weight, stats):
    """`W_float - W`. Raises LoraFuncError unless `stats` can be the float weight of the layer."""
    if not isinstance(stats, Tensor) or stats.shape != weight.shape:
        given = f"a tensor of shape {tuple(stats.shape)}" if isinstance(stats, Tensor) else stats
        raise LoraFuncError(
            "LoftQ starts from what quantization lost: pass stats={path: float weight of the "
            f"layer}}, here of shape {weight.shape} (d_out, d_in), not {given}"
        )
    W = at_least_float32(weight.dense())
    R = stats.detach().to(W) - W
    if not R.any():
        raise LoraFuncError(
            "LoftQ starts from what quantization lost, and the layer has lost nothing: its weight "
            "is the one in stats. Take lf.LoRA()"
        )
    if R.norm() > (W + R).norm():
        raise LoraFuncError(
            "the weight in stats is farther from that of the layer than from zero, so it belongs "
            "to another layer, or is transposed"
        )
    return R
