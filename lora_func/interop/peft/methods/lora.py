"""LoRA and its kin: one config class of PEFT for many variants."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import LoraFuncError
from ....variants import (
    EVA,
    AdaLoRA,
    DoRA,
    GraLoRA,
    HiRA,
    LoftQ,
    LoRA,
    OLoRA,
    PiSSA,
)
from ....weights.parameter import ParameterWeight
from ..method import Folder, Leaf, Method

A_B = {"A": Leaf("lora_A.weight"), "B": Leaf("lora_B.weight")}
SCALED = {"r": "r", "alpha": "lora_alpha", "rslora": "use_rslora"}
PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
IDLE = (
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("runtime_config", "megatron_config", "megatron_core", "qalora_group_size"),
)
PLAIN = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights with which the base keeps its weights when PEFT loads the folder."""

lora = Method(
    peft_type="LORA",
    kind=LoRA,
    when={"use_dora": False, "init_lora_weights": PLAIN},
    fields={**SCALED, "add_bias": "lora_bias"},
    defaults={"r": 8, "lora_alpha": 8, "use_rslora": False, "lora_bias": False},
    patterns=PATTERNS,
    dropout="lora_dropout",
    idle=IDLE,
    leaves={**A_B, "b": Leaf("lora_B.bias")},
)


def spectrum(folder: Folder) -> dict[str, Any]:
    """r and alpha of an AdaLoRA whose allocator has taken triplets away.

    PEFT leaves those out of the file and keeps dividing by the rank at the start.
    """
    r0 = folder.config.get("init_r", 12)
    left = len(folder.tensors.get("lora_E", torch.empty(r0)))
    alpha = folder.config.get("lora_alpha", 8) or r0
    return {"r": left, "alpha": alpha * (left + 1e-5) / (r0 + 1e-5)}


def found_rank(variant: Any, leaves: dict[str, Tensor]) -> dict[str, Any]:
    """The rank of a layer, which data has found, and the alpha that keeps its scale."""
    r = len(leaves["A"])
    return {"r": r, "lora_alpha": variant.scale * (r**0.5 if variant.rslora else r)}


LORA = (
    lora,
    dataclasses.replace(
        lora,
        kind=DoRA,
        when={"use_dora": True, "init_lora_weights": PLAIN, "lora_bias": False},
        fields=SCALED,
        leaves={**A_B, "m": Leaf("lora_magnitude_vector")},
        derived=True,
    ),
    *(
        dataclasses.replace(
            lora,
            kind=kind,
            when={"init_lora_weights": name, "use_dora": False, "lora_bias": False},
            fields=SCALED,
            leaves=A_B,
            derived=True,
            accepts=lambda variant: False,
            refusal=(
                "PEFT keeps such an adapter beside a rewritten base. A LoRA of twice the rank "
                "does exactly the same: save that of lf.as_lora(adapter, params)"
            ),
        )
        for name, kind in (("pissa", PiSSA), ("olora", OLoRA))
    ),
    *(
        dataclasses.replace(lora, kind=kind, fields=SCALED, leaves=A_B, write=found_rank)
        for kind in (EVA, LoftQ)
    ),
    Method(
        peft_type="ADALORA",
        kind=AdaLoRA,
        fields={"r": "init_r", "alpha": "lora_alpha"},
        defaults={"init_r": 12, "lora_alpha": 8},
        read=spectrum,
        write=lambda variant, leaves: {"target_r": variant.r, "total_step": 1},
        dropout="lora_dropout",
        idle=(
            *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
            *("total_step", "rank_pattern", "r", *IDLE),
        ),
        leaves={
            "A": Leaf("lora_A"),
            "B": Leaf("lora_B"),
            "E": Leaf("lora_E", lambda E: E[:, None], lambda E: E.squeeze(1)),
        },
    ),
    Method(
        peft_type="GRALORA",
        kind=GraLoRA,
        fields={"r": "r", "alpha": "alpha", "k": "gralora_k", "hybrid_r": "hybrid_r"},
        defaults={"r": 32, "alpha": 64, "gralora_k": 2, "hybrid_r": 0},
        dropout="gralora_dropout",
        leaves={
            "A": Leaf("gralora_A"),
            "B": Leaf("gralora_B"),
            "A_h": Leaf("gralora_A_general.weight"),
            "B_h": Leaf("gralora_B_general.weight"),
        },
    ),
    Method(
        peft_type="HIRA",
        kind=HiRA,
        # Of the file, because PEFT 0.21 does not follow its rank_pattern.
        read=lambda folder: {"r": len(folder.tensors.get("hira_A", (None,)))},
        write=lambda variant, leaves: {"r": variant.r},
        dropout="hira_dropout",
        idle=("r", "rank_pattern"),
        leaves={"A": Leaf("hira_A"), "B": Leaf("hira_B")},
    ),
)

REWRITTEN = (
    "the base of that adapter is another one, {}. If your model is that base, set "
    "init_lora_weights to true in the config"
)
INITS = {
    "corda": REWRITTEN.format("which PEFT rewrites by data"),
    "lora_ga": REWRITTEN.format("which PEFT rewrites by gradients"),
    "loftq": REWRITTEN.format("quantized by PEFT"),
    "pissa_niter": REWRITTEN.format("which PEFT rewrites by a random decomposition"),
}
"""Beginnings of init_lora_weights that no variant can follow, and why."""


def laid_out(method: Method, weight: Any) -> Method:
    """`method` with the leaves that PEFT has for a weight that is no linear layer.

    Raises LoraFuncError for a combination that only one of the two libraries has.
    """
    if not isinstance(weight, ParameterWeight):
        return method
    module, kind = weight.module, type(weight.module).__name__
    if method is not lora:
        raise LoraFuncError(
            f"{weight.path!r} is a parameter of a {kind}, where only a plain LoRA can be exchanged "
            f"with PEFT, and not {method.kind.__name__}"
        )
    if weight.layout.kernel:
        return dataclasses.replace(method, leaves=kernel(weight))
    if isinstance(module, nn.Embedding):
        return dataclasses.replace(method, leaves=EMBEDDING)
    raise LoraFuncError(f"{weight.path!r} is a parameter of a {kind}, which PEFT does not reach")


EMBEDDING = {
    # PEFT's A stands for rows of the table, and ours for its columns.
    "A": Leaf("lora_embedding_B", lambda A: A.mT, lambda B: B.mT),
    "B": Leaf("lora_embedding_A", lambda B: B.mT, lambda A: A.mT),
}


def kernel(weight: ParameterWeight) -> dict[str, Leaf]:
    """The leaves of a convolution."""
    module: Any = weight.module
    plain = module.groups == 1 and module.padding_mode == "zeros" and not weight.layout.transposed
    if not plain or any(size != 1 for size in module.dilation):
        raise LoraFuncError(
            f"{weight.path!r}: PEFT's LoRA of a convolution with groups, a dilation, another "
            "padding than zeros, or of a transposed one is another function than an update of its "
            "kernel"
        )
    _, *sizes = weight.layout.stored
    ones = [1] * (len(sizes) - 1)
    return {
        "A": Leaf("lora_A.weight", lambda A: A.unflatten(1, sizes), lambda A: A.flatten(1)),
        "B": Leaf("lora_B.weight", lambda B: B.reshape(*B.shape, *ones), lambda B: B.flatten(1)),
    }


def experts(weight: ParameterWeight) -> Method:
    """LoRA of a parameter that PEFT names in target_parameters.

    PEFT puts the ranks of all experts in a row: A `[E r, d_in]`, and B `[d_out, r E]` with the
    expert as its last index. What it takes for d_in is the last axis of the stored tensor, unless
    the module says that it is transposed.
    """
    stack = weight.layout.is_stack
    turned = weight.layout.transposed != (stack and getattr(weight.module, "is_transposed", False))
    E = weight.layout.stored[0] if stack else 1

    def rows(A: Tensor) -> Tensor:
        return A.flatten(0, 1) if stack else A

    def columns(B: Tensor) -> Tensor:
        return B.permute(1, 2, 0).flatten(1) if stack else B

    def of_rows(A: Tensor) -> Tensor:
        return A.unflatten(0, (E, -1)) if stack else A

    def of_columns(B: Tensor) -> Tensor:
        return B.unflatten(1, (-1, E)).permute(2, 0, 1) if stack else B

    leaves = {"A": Leaf("lora_A.weight", rows, of_rows)}
    leaves["B"] = Leaf("lora_B.weight", columns, of_columns)
    if turned:  # ΔWᵀ = Aᵀ Bᵀ
        leaves = {
            "A": Leaf("lora_B.weight", lambda A: columns(A.mT), lambda B: of_columns(B).mT),
            "B": Leaf("lora_A.weight", lambda B: rows(B.mT), lambda A: of_rows(A).mT),
        }
    return dataclasses.replace(lora, leaves=leaves)
