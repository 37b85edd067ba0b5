"""ROAD: rotation and scaling of pairs of outputs. Liao & Monz 2024, arXiv 2409.00119.

    out = c ∘ base_out + s ∘ rot(base_out),    c = alpha cos(theta),    s = alpha sin(theta)

Outputs i and i + g/2 of each group of g = `group_size` are a pair, and rot sends (y, y') to
(-y', y). The kinds differ in how many angles and scales a pair has:

    road_1    one of each, so a pair is rotated and scaled      theta, alpha [d_out / 2]
    road_2    one for each output                               theta, alpha [d_out]
    road_4    one for each c and each s                         theta, alpha [2 d_out]

theta is zero and alpha one at init; alpha is stored as a = alpha - 1. out is computed as
base_out + (c - 1) base_out + s rot(base_out), with c - 1 = a cos(theta) - 2 sin²(theta / 2), which
is the base output to the bit. The bias is rotated and scaled too. Nothing of the weight is read.
The paper pairs neighbours, 2i and 2i + 1; PEFT, lora-lite and this file pair the halves of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card, Peft
from ..checks import check_choice, check_rank
from ..errors import LoraFuncError
from ..linalg import at_least_float32
from ..variant import Params, Variant


@dataclass(frozen=True, kw_only=True)
class ROAD(Variant):
    """2D rotary adaptation, Liao & Monz 2024 (arXiv 2409.00119).

    Trainable: theta and a [d_out / 2], [d_out] or [2 d_out] for road_1, road_2, road_4.
    """

    card = Card(
        title="Rotation and scaling of pairs of outputs",
        authors="Liao & Monz 2024",
        source="2409.00119",
        formula="alpha cos(theta) base_out + alpha sin(theta) rot(base_out)",
        trainable={"theta": "n * d_out // 2", "a": "n * d_out // 2"},
        reads="nothing",
        lr=3e-2,
        peft=Peft("RoadConfig", rank=None),
        beside_peft="the same function; the scale is stored as its deviation from 1",
    )
    prepares_together = True

    kind: str = "road_1"
    """How many angles, and as many scales, a pair of outputs has: "road_1" one, "road_2" two,
    "road_4" four."""
    group_size: int = 64
    """g: outputs i and i + g/2 of each group are a pair. Even, and divides d_out."""

    def __post_init__(self):
        check_choice(self, "kind", ("road_1", "road_2", "road_4"))
        check_rank(self, "group_size")
        if self.group_size % 2:
            raise LoraFuncError(f"ROAD(group_size={self.group_size}): group_size must be even")

    @property
    def n(self) -> int:
        """Angles, and scales, for each pair of outputs."""
        return {"road_1": 1, "road_2": 2, "road_4": 4}[self.kind]

    def init(self, weight, generator, stats=None):
        d_out = weight.shape[0]
        if d_out % self.group_size:
            raise LoraFuncError(
                f"ROAD(group_size={self.group_size}) on a layer with {d_out} outputs: group_size "
                "must divide them"
            )
        theta = torch.zeros(self.n * d_out // 2, dtype=torch.float32)
        return Params({"theta": theta, "a": theta.clone()})

    def coefficients(self, params):
        """c - 1 and s `[d_out]`."""
        theta, a = at_least_float32(params["theta"]), at_least_float32(params["a"])
        c, s = a * theta.cos() - 2 * (theta / 2).sin().square(), (1 + a) * theta.sin()
        g = self.group_size
        if self.kind == "road_1":  # shared by the pair
            return tuple(t.reshape(-1, 1, g // 2).expand(-1, 2, -1).flatten() for t in (c, s))
        if self.kind == "road_4":  # in turn for a group of c and a group of s
            return c.reshape(-1, 2, g)[:, 0].flatten(), s.reshape(-1, 2, g)[:, 1].flatten()
        return c, s

    def prepare(self, weight, params, dtype):
        c, s = self.coefficients(params)
        return {"c - 1": c.to(dtype), "s": s.to(dtype)}

    def turned(self, y, c, s):
        """y + (c - 1) y + s rot(y), without a tensor for rot(y) that backward would keep"""
        pairs = (2, self.group_size // 2)
        (y1, y2), (c1, c2), (s1, s2) = (
            t.to(y.dtype).unflatten(-1, (-1, *pairs)).unbind(-2) for t in (y, c, s)
        )
        first = torch.addcmul(torch.addcmul(y1, y1, c1), y2, s1, value=-1)
        second = torch.addcmul(torch.addcmul(y2, y2, c2), y1, s2)
        return torch.stack([first, second], dim=-2).flatten(-3)

    def apply(self, x, base_out, weight, params):
        p = self.prepared(weight, params, base_out.dtype)
        return self.turned(base_out, p["c - 1"], p["s"])

    def merged(self, weight, params):
        # R W, R b
        c, s = self.coefficients(params)
        W = self.turned(at_least_float32(weight.dense()).mT, c, s).mT
        return W, None if weight.bias is None else self.turned(weight.bias, c, s)
