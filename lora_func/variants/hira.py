"""HiRA: an entrywise rescaling of the weight, by a low-rank matrix. Huang et al. 2025,
openreview.net/forum?id=TwJrTz9cRS.

    out = base_out + x (W ∘ (B A))ᵀ                                   ( W_eff = W ∘ (1 + B A) )

A [r, d_in] is Kaiming-uniform and B [d_out, r] zero, so the output at init is the base output to
the bit. The rank of the update reaches r times that of W. There is no scale, as in PEFT. B A is
relative to the entries of W, which are small, so it takes a larger learning rate than LoRA's; the
authors have 1e-3.

By nature the method needs the matrix W on each call. W ∘ (B A) is made anew in forward and in
backward, and not kept; a quantized W is dequantized each time. For T tokens that costs
(r + T) d_out d_in. The sum Σ_k B_k ∘ (W (A_k ∘ x)) makes no matrix, but costs r T d_out d_in and
keeps r outputs for the gradient of B: with r = 16, on a layer of 1024 x 1024, it is faster for one
token, and 20 times slower for 512. Each token that is decoded alone pays for the matrix: merge the
adapter to decode with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..card import Card, Peft
from ..checks import check_rank
from ..libraries.functorch import applied
from ..linalg import at_least_float32, kaiming
from ..variant import Params, Variant, Weight


@dataclass(frozen=True, kw_only=True)
class HiRA(Variant):
    """Hadamard high-rank adaptation, Huang et al. 2025.

    Trainable: A [r, d_in], B [d_out, r].
    """

    card = Card(
        title="An entrywise rescaling of the weight",
        authors="Huang et al. 2025",
        source="openreview.net/forum?id=TwJrTz9cRS",
        formula="base_out + x (W ∘ (B A))ᵀ",
        trainable={"A": "r, d_in", "B": "d_out, r"},
        reads="dense",
        lr=0.03,
        peft=Peft("HiraConfig"),
        beside_peft="the same function; PEFT keeps a dense W ∘ (B A) of each layer for backward",
    )

    r: int = 32
    """Rank of B A, at least 1."""

    def __post_init__(self):
        check_rank(self)

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        B = torch.zeros(d_out, self.r, dtype=torch.float32)
        return Params({"A": kaiming(self.r, d_in, generator), "B": B})

    def prepare(self, weight, params, dtype):
        return {name: leaf.to(dtype) for name, leaf in params.items()}

    def apply(self, x, base_out, weight, params):
        p, dtype = self.prepared(weight, params, base_out.dtype), base_out.dtype
        # Cast as autocast would, which sees no custom function.
        x, A, B = (t.to(dtype) for t in (x, p["A"], p["B"]))
        return base_out + rescaled_product(x, A, B, weight)

    def merged(self, weight, params):
        # W + W ∘ (B A)
        W, A, B = (at_least_float32(t) for t in (weight.dense(), params["A"], params["B"]))
        return W + W * (B @ A), weight.bias


def rescaled_product(x: Tensor, A: Tensor, B: Tensor, weight: Weight) -> Tensor:
    """`x (W ∘ (B A))ᵀ`, of tensors in one dtype.

    Keeps x, A and B for backward, and the stored W; a packed one is unpacked there once more.
    """
    if torch.compiler.is_compiling():  # which traces no jvp, and itself chooses what to keep
        return F.linear(x, weight.dense().to(x.dtype) * (B @ A))
    return applied(RescaledProduct, x, A, B, None if weight.opaque else weight.dense(), weight)


class RescaledProduct(torch.autograd.Function):
    """`rescaled_product` for autograd. W is a constant to it; None: to be unpacked."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, A, B, W, weight):  # pyright: ignore
        W = (weight.dense() if W is None else W).to(x.dtype)
        return F.linear(x, W * (B @ A))

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        *tensors, ctx.weight = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore
        x, A, B, W = ctx.saved_tensors
        W = (ctx.weight.dense() if W is None else W).to(x.dtype)
        G = W * (grad.reshape(-1, grad.shape[-1]).mT @ x.reshape(-1, x.shape[-1]))  # of B A
        return grad @ (W * (B @ A)), B.mT @ G, G @ A.mT, None, None

    @staticmethod
    def jvp(ctx: Any, dx, dA, dB, *_):  # pyright: ignore
        x, A, B, W = ctx.saved_tensors
        W = (ctx.weight.dense() if W is None else W).to(x.dtype)
        return F.linear(dx, W * (B @ A)) + F.linear(x, W * (dB @ A + B @ dA))
