"""The card of a method: what is known of it, declared once, on its class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

AT_INIT = ("exact", "rounding", "moved")
READS = ("nothing", "init", "rows", "dense")
DATA = ("none", "optional", "required")
TARGETS = "TARGETS"  # in `Peft.fields`, stands for the names of the target layers


class Peft(NamedTuple):
    """The same method in PEFT."""

    config: str
    """Name of PEFT's class, such as "LoraConfig"."""
    fields: Mapping[str, Any] = {}
    """Fields of that class that select the method, such as {"use_dora": True}."""
    rank: str | None = "r"
    """PEFT's name of the field `r`. None if it has none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Card:
    """What is known of a method. README, docs, tests, demo and benchmarks read it from here.

    A variant in a notebook needs no card: the defaults promise what every variant must keep.
    """

    title: str = ""
    """What the method does, in a few words."""
    authors: str = ""
    """And the year: "Hu et al. 2021"."""
    source: str = ""
    """An arXiv number such as "2106.09685", or a web address."""
    formula: str = ""
    """One line, as in the paper."""
    trainable: Mapping[str, str] = field(default_factory=dict)
    """Leaf -> its shape, in d_out, d_in and attributes of the variant: `{"A": "r, d_in"}`."""
    at_init: str = "exact"
    """The output at init equals the base output: "exact", to the bit; "rounding", up to rounding;
    "moved", not at all, by design."""
    reads: str = "rows"
    """Of the weight: "nothing"; "init", the dense matrix once, at init; "rows", also a few rows
    pushed through it on each call; "dense", the matrix in each `apply`, which keeps none of it."""
    data: str = "none"
    """Whether `init` uses calibration data: "none", "optional" or "required"."""
    any_shape: bool = False
    """Takes parameters of any shape, such as biases and norms, and not only matrices."""
    lr: float = 1e-3
    """A learning rate of AdamW to start from. It comes from the sweep (docs/sweep.md): short runs
    of a small model. Larger models and longer runs want less."""
    layers: tuple[str, ...] = (r"q_proj$", r"v_proj$")
    """Regexes of the layers to start with."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields to start with, beside r: name -> value."""
    width: int = 1
    """r is usually this many times LoRA's rank."""
    peft: Peft | None = None
    """The same method in PEFT. None: PEFT does not have it."""
    beside_peft: str = ""
    """How the two differ, in a phrase."""

    def __post_init__(self) -> None:
        for name, known in (("at_init", AT_INIT), ("reads", READS), ("data", DATA)):
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise ValueError(f"Card({name}={given!r}): {name} must be one of {known}")

    def shapes(
        self, variant: Any, shape: tuple[int, ...], **known: int
    ) -> dict[str, tuple[int, ...]]:
        """Leaf -> its shape as `trainable` declares it, for a layer of `shape` (d_out, d_in).

        A leaf with a None in its shape is one that the layer does not have. `known`: values of
        other names, such as `bias`, whether the layer has one. A rank r_l that depends on data is r
        unless it is given.
        """

        class Scope(dict[str, int]):
            def __missing__(self, name: str) -> int:
                return getattr(variant, "r" if name == "r_l" else name)

        scope = Scope(d_out=shape[0], d_in=shape[1], **known)
        shapes = {
            name: eval(f"({text},)" if text else "()", {"__builtins__": {}}, scope)
            for name, text in self.trainable.items()
        }
        return {name: shape for name, shape in shapes.items() if None not in shape}

    @staticmethod
    def suggested(kind: Any, r: int) -> Any:
        """A variant of the class `kind` with the settings of its card.

        Its rank, if it has one, is `r` times the width of its card.
        """
        rank = {"r": r * kind.card.width} if "r" in kind.__dataclass_fields__ else {}
        return kind(**rank, **kind.card.settings)

    @property
    def url(self) -> str:
        """The address of `source`."""
        return self.source if "/" in self.source else f"arxiv.org/abs/{self.source}"


def amend_card(variant: Any, **changes: Any) -> None:
    """Gives a variant a card of its own, where an option changes what the class promises.

    For `__post_init__`: the variant is frozen from then on.
    """
    object.__setattr__(variant, "card", dataclasses.replace(variant.card, **changes))
