"""Methods whose layers share tensors, or whose constants come from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....variants import FourierFT, RandLoRA, TinyLoRA, VBLoRA, VeRA
from ..method import Leaf, Method

Sizes = tuple[int, ...]


def drawn(shape: Sizes, fan: int, generator: torch.Generator) -> Tensor:
    """PEFT's draw of a projection: U(±sqrt(6 / fan))."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def vera(config: Mapping[str, Any], largest: Sizes) -> dict[str, Tensor]:
    """VeRA's projections, of a file without them."""
    (d_out, d_in), r = largest, config.get("r", 256)
    generator = torch.Generator().manual_seed(config.get("projection_prng_key", 0))
    A = drawn((r, d_in), d_in, generator)
    return {"A": A, "B": drawn((d_out, r), r, generator)}


def frequencies(config: Mapping[str, Any], variant: Any, shape: Sizes) -> dict[str, Tensor]:
    """FourierFT's frequencies in a layer of this shape."""
    generator = torch.Generator().manual_seed(config.get("random_loc_seed", 777))
    at = torch.randperm(shape[0] * shape[1], generator=generator)[: variant.n]
    return {"rows": (at // shape[1]).int(), "cols": (at % shape[1]).int()}


def tiny(share: bool) -> Method:
    """TinyLoRA, with one vector for all layers or one for each."""
    v = Leaf("tinylora_v")
    return Method(
        peft_type="TINYLORA",
        kind=TinyLoRA,
        when={"save_projection": True, "weight_tying": 1.0 if share else 0.0},
        accepts=lambda variant: variant.share == share,
        fields={"r": "r", "n": "u"},
        defaults={"r": 2, "u": 64},
        read=lambda folder: {"share": share},
        dropout="tinylora_dropout",
        idle=("projection_seed", "init_v_bound"),
        leaves={} if share else {"v": v},
        shared={"v": Leaf("tinylora_v.0")} if share else {},
        numbered=() if share else ("v",),
        constants={name: Leaf(f"tinylora_{name}") for name in ("A", "B", "P")},
    )


PROJECTIONS = (
    Method(
        peft_type="VERA",
        kind=VeRA,
        fields={"r": "r", "d_initial": "d_initial"},
        defaults={"r": 256, "d_initial": 0.1},
        dropout="vera_dropout",
        idle=("projection_prng_key", "save_projection"),
        leaves={"lb": Leaf("vera_lambda_b"), "ld": Leaf("vera_lambda_d")},
        shared={"A": Leaf("vera_A"), "B": Leaf("vera_B")},
        draw=vera,
    ),
    Method(
        peft_type="RANDLORA",
        kind=RandLoRA,
        fields={"r": "r", "alpha": "randlora_alpha"},
        defaults={"r": 32, "randlora_alpha": 640},
        dropout="randlora_dropout",
        idle=("projection_prng_key", "save_projection", "sparse", "very_sparse"),
        leaves={"lam": Leaf("randlora_lambda"), "gam": Leaf("randlora_gamma")},
        shared={"bases_A": Leaf("randlora_A"), "bases_B": Leaf("randlora_B")},
        copied=True,
    ),
    Method(
        peft_type="VBLORA",
        kind=VBLoRA,
        when={"save_only_topk_weights": False},
        accepts=lambda variant: variant.start == "peft",
        refusal=(
            'with start="exact" a frozen copy is subtracted, which PEFT does not have. Its update '
            "is low-rank: save that of lf.as_lora(adapter, params)"
        ),
        fields={name: name for name in ("r", "num_vectors", "vector_length", "topk")},
        defaults={"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2},
        read=lambda folder: {"start": "peft"},
        dropout="vblora_dropout",
        idle=("init_vector_bank_bound", "init_logits_std"),
        leaves={"logits_A": Leaf("vblora_logits_A"), "logits_B": Leaf("vblora_logits_B")},
        shared={"bank": Leaf("vblora_vector_bank")},
    ),
    tiny(share=False),
    tiny(share=True),
    Method(
        peft_type="FOURIERFT",
        kind=FourierFT,
        fields={"n": "n_frequency", "alpha": "scaling"},
        defaults={"n_frequency": 1000, "scaling": 150.0},
        patterns={"n_frequency": "n_frequency_pattern"},
        anchored=False,
        idle=("random_loc_seed",),
        leaves={"c": Leaf("fourierft_spectrum")},
        place=frequencies,
    ),
)
