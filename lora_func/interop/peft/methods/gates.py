"""Methods that turn or scale what goes into a layer or comes out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....linalg import skew
from ....variants import BOFT, HRA, IA3, IA3FF, OFT, ROAD
from .. import names
from ..method import Folder, Leaf, Method


def side(v: Tensor) -> int:
    """n, from the n (n - 1) / 2 entries above a diagonal."""
    return (1 + math.isqrt(1 + 8 * v.shape[-1])) // 2


def above(R: Tensor) -> Tensor:
    """The entries above the diagonal of the skew-symmetric part, row by row."""
    rows, cols = torch.triu_indices(R.shape[-1], R.shape[-1], 1, device=R.device)
    return ((R - R.mT) / 2)[..., rows, cols]


def block(folder: Folder) -> Mapping[str, Any]:
    """OFT's block size: of the file, because PEFT adjusts one that does not divide d_in."""
    return {"block_size": side(folder.tensors.get("oft_R.weight", torch.empty(0)))}


def butterfly(folder: Folder) -> Mapping[str, Any]:
    """BOFT's sizes: of the file, because PEFT takes m = 1 where it cannot compile its kernel."""
    shape = folder.tensors.get("boft_R", torch.empty(1, 1, 2, 2)).shape
    return {"m": shape[0], "block_size": shape[-1]}


def rotation(exact: bool) -> Method:
    """OFT. Its exact form is the inverse rotation in PEFT."""
    fields = {"share": "block_share"}
    return Method(
        peft_type="OFT",
        kind=OFT,
        when={"use_cayley_neumann": (not exact,), "coft": (False,)},
        accepts=lambda variant: (variant.terms is None) == exact,
        fields=fields if exact else {**fields, "terms": "num_cayley_neumann_terms"},
        defaults={"block_share": False, "num_cayley_neumann_terms": 5},
        read=block,
        write=lambda variant, leaves: {"oft_block_size": variant.block_size},
        idle=("r", "oft_block_size", "module_dropout", "eps", "num_cayley_neumann_terms"),
        leaves={"v": Leaf("oft_R.weight", torch.neg, torch.neg) if exact else Leaf("oft_R.weight")},
    )


GATES = (
    Method(
        peft_type="IA3",
        kind=IA3,
        layers=lambda config, path: not names.feeds_forward(config, path),
        idle=("feedforward_modules",),
        leaves={"d": Leaf("ia3_l", lambda d: (1 + d)[:, None], lambda g: g.squeeze(1) - 1)},
    ),
    Method(
        peft_type="IA3",
        kind=IA3FF,
        layers=names.feeds_forward,
        idle=("feedforward_modules",),
        leaves={"d": Leaf("ia3_l", lambda d: (1 + d)[None], lambda g: g.squeeze(0) - 1)},
    ),
    Method(
        peft_type="HRA",
        kind=HRA,
        when={"apply_GS": False},
        fields={"r": "r"},
        defaults={"r": 8},
        leaves={"U": Leaf("hra_u", lambda U: U.mT, lambda U: U.mT)},
    ),
    rotation(exact=False),
    rotation(exact=True),
    Method(
        peft_type="BOFT",
        kind=BOFT,
        read=butterfly,
        write=lambda variant, leaves: {
            "boft_block_size": variant.block_size,
            "boft_n_butterfly_factor": variant.m,
        },
        idle=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"),
        leaves={
            # The inverse rotation.
            "v": Leaf("boft_R", lambda v: skew(-v, side(v)), lambda R: -above(R)),
            "ds": Leaf("boft_s", lambda ds: (1 + ds)[:, None], lambda s: s.squeeze(1) - 1),
        },
    ),
    Method(
        peft_type="ROAD",
        kind=ROAD,
        fields={"kind": "variant", "group_size": "group_size"},
        defaults={"variant": "road_1", "group_size": 64},
        leaves={
            "theta": Leaf("road_theta"),
            "a": Leaf("road_alpha", lambda a: 1 + a, lambda alpha: alpha - 1),
        },
    ),
)
