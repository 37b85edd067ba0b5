"""Additive updates of other forms than a low-rank product."""

from __future__ import annotations

from ....variants import C3A, DeLoRA, LoHa, LoKr, MiSS, SHiRA
from ..method import Folder, Leaf, Method

RANK_ALPHA = {"r": "rank_pattern", "alpha": "alpha_pattern"}


def kronecker(folder: Folder) -> dict[str, int | None]:
    """decompose_factor, where PEFT's -1 is our None."""
    factor = folder.config.get("decompose_factor", -1)
    return {"decompose_factor": None if factor == -1 else factor}


UPDATES = (
    Method(
        peft_type="LOHA",
        kind=LoHa,
        fields={"r": "r", "alpha": "alpha"},
        defaults={"r": 8, "alpha": 8},
        patterns=RANK_ALPHA,
        idle=("rank_dropout", "module_dropout", "use_effective_conv2d"),
        leaves={name: Leaf(f"hada_{name[:2]}_{name[2]}") for name in ("w1a", "w1b", "w2a", "w2b")},
    ),
    Method(
        peft_type="LOKR",
        kind=LoKr,
        fields={"r": "r", "alpha": "alpha", "decompose_both": "decompose_both"},
        defaults={"r": 8, "alpha": 8, "decompose_both": False},
        patterns=RANK_ALPHA,
        read=kronecker,
        write=lambda variant, leaves: {"decompose_factor": variant.decompose_factor or -1},
        idle=(
            *("rank_dropout", "module_dropout", "rank_dropout_scale"),
            *("decompose_factor", "use_effective_conv2d"),
        ),
        leaves={
            name: Leaf(f"lokr_{'_'.join((name[:2], *name[2:]))}")
            for name in ("w1", "w1a", "w1b", "w2", "w2a", "w2b")
        },
    ),
    Method(
        peft_type="MISS",
        kind=MiSS,
        when={"init_weights": (True, False)},
        accepts=lambda variant: variant.mini_r is None,
        fields={"r": "r"},
        defaults={"r": 64},
        dropout="miss_dropout",
        idle=("mini_r",),
        leaves={"D": Leaf("miss_block")},
    ),
    Method(
        peft_type="MISS",
        kind=MiSS,
        when={"init_weights": "mini"},
        accepts=lambda variant: variant.mini_r is not None,
        fields={"r": "r", "mini_r": "mini_r"},
        defaults={"r": 64, "mini_r": 1},
        dropout="miss_dropout",
        leaves={"D": Leaf("miss_block")},
    ),
    Method(
        peft_type="DELORA",
        kind=DeLoRA,
        accepts=lambda variant: variant.start == "peft",
        refusal=(
            'with start="paper" a frozen copy is subtracted, which PEFT does not have. Its update '
            "is low-rank: save that of lf.as_lora(adapter, params)"
        ),
        fields={"r": "r", "lambda0": "delora_lambda"},
        defaults={"r": 8, "delora_lambda": 15},
        patterns={"r": "rank_pattern", "delora_lambda": "lambda_pattern"},
        idle=("module_dropout",),
        leaves={
            "A": Leaf("delora_A"),
            "B": Leaf("delora_B"),
            "lam": Leaf("delora_lambda", lambda t: t.reshape(1), lambda t: t.reshape(())),
        },
        constants={"wn": Leaf("delora_w_norm")},
    ),
    Method(
        peft_type="SHIRA",
        kind=SHiRA,
        fields={"r": "r"},
        defaults={"r": 32},
        idle=("mask_type", "random_seed"),
        leaves={"v": Leaf("shira_weight")},
        constants={
            "rows": Leaf("shira_indices", lambda rows: rows[None], lambda both: both[0].int()),
            "cols": Leaf("shira_indices", lambda cols: cols[None], lambda both: both[1].int()),
        },
    ),
    Method(
        peft_type="C3A",
        kind=C3A,
        fields={"block_size": "block_size"},
        defaults={"block_size": 256},
        patterns={"block_size": "block_size_pattern"},
        anchored=False,
        leaves={"w": Leaf("c3a_kernel")},
    ),
)
