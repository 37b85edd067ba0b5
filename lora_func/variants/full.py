"""Full: a dense trainable difference, which is full fine-tuning of the parameters that you name.

    out = base_out + x Dᵀ + d

D has the shape of the weight, and d [d_out] is there if the layer has a bias. Both are zero at
init, so the output is the base output to the bit. Parameters that are not matrices, such as biases,
norms and scalars, have D alone, in their own shape. On all biases and nothing else it is BitFit,
Zaken et al. 2021, arXiv 2106.10199. Use it for a fresh head, for new rows of an embedding, and to
compare with full fine-tuning. The gradient in x needs D: if x has another dtype, backward keeps a
copy of D in that dtype. Nothing of the weight is read.

The leaf is the difference and not the weight: a weight in bfloat16 would round small steps away,
and weight decay would pull it to zero instead of to the base model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..card import Card
from ..linalg import at_least_float32
from ..variant import Params, Variant


@dataclass(frozen=True, kw_only=True)
class Full(Variant):
    """A dense difference. On biases: BitFit, Zaken et al. 2021 (arXiv 2106.10199).

    Trainable: D [d_out, d_in], or of the shape of the parameter, and d [d_out] beside a bias.
    """

    card = Card(
        title="A dense difference of any parameter",
        authors="Zaken et al. 2021",
        source="2106.10199",
        formula="base_out + x Dᵀ + d",
        trainable={"D": "d_out, d_in", "d": "d_out if bias else None"},
        reads="nothing",
        any_shape=True,
        lr=1e-3,
        beside_peft="`modules_to_save` stores the whole weight; this stores the difference",
    )

    def init(self, weight, generator, stats=None):
        leaves = {"D": torch.zeros(weight.shape, dtype=torch.float32)}
        if weight.bias is not None:
            leaves["d"] = torch.zeros(weight.bias.shape, dtype=torch.float32)
        return Params(leaves)

    def like(self, weight, leaves):
        # A file tells whether its layer has a bias.
        D = torch.empty(weight.shape)
        if "d" in leaves and D.dim() == 2:
            return Params({"D": D, "d": torch.empty(len(D))})
        return Params({"D": D})

    def prepare(self, weight, params, dtype):
        return {name: leaf.to(dtype) for name, leaf in params.items()}

    def apply(self, x, base_out, weight, params):
        p = {n: t.to(x.dtype) for n, t in self.prepared(weight, params, x.dtype).items()}
        return base_out + F.linear(x, p["D"], p.get("d")).to(base_out.dtype)

    def merged(self, weight, params):
        # W + D, b + d
        b, d = weight.bias, params.get("d")
        bias = b if d is None else d + (0 if b is None else b)
        return at_least_float32(weight.dense()) + params["D"], bias
