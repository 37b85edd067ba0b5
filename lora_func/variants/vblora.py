"""VB-LoRA: factors composed of vectors of a bank that all layers share. Li et al. 2024,
arXiv 2405.15179.

    out = base_out + x (B A)ᵀ - x (B0 A0)ᵀ

A [r, d_in] and B [d_out, r] consist of sub-vectors of length b, which divides d_in and d_out: each
is Σ_j softmax(l)_j bank_j over the k largest of its h logits l. The bank [h, b] is trained, and so
are the logits; those that are not among the k largest have no gradient until they are.

A0 and B0 are A and B at the start, from frozen copies of the logits and the bank. The difference
is telescoped, so the output at init is the base output to the bit. (With a bank of zeros it would
be, too, but nothing could learn.) The authors and PEFT add B A alone: `start="peft"`. This moves
the output at init, by about 1e-3 of it, and has half the leaves. A PEFT adapter has the bank0 of
zeros. The start is PEFT's: logits N(0, 0.01), bank U(±0.02). There is no scale. The authors train
the logits with ten times the learning rate of the bank.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..card import Card, Peft, amend_card
from ..checks import check_choice, check_rank
from ..errors import LoraFuncError
from ..linalg import at_least_float32, low_rank_difference, normal, uniform
from ..variant import Params
from ._blocks import check_divides
from ._low_rank import Product


def composed(logits, bank, k):
    """`[.., b]`: means of the k vectors of the bank `[h, b]` that the logits `[.., h]` choose."""
    top, at = at_least_float32(logits).topk(k)
    return (top.softmax(-1)[..., None] * bank[at]).sum(-2)


@dataclass(frozen=True, kw_only=True)
class VBLoRA(Product):
    """Low-rank factors from a bank of vectors, Li et al. 2024 (arXiv 2405.15179).

    Trainable: logits_A [r, d_in / b, h], logits_B [d_out / b, r, h], and the bank [h, b] of all.
    """

    card = Card(
        title="Factors composed of vectors of a bank, shared by all layers",
        authors="Li et al. 2024",
        source="2405.15179",
        formula="base_out + x (B A - B0 A0)ᵀ, sub-vectors softmax(top k of logits) bank",
        trainable={
            "logits_A": "r, d_in // vector_length, num_vectors",
            "logits_B": "d_out // vector_length, r, num_vectors",
            "bank": "num_vectors, vector_length",
        },
        reads="nothing",
        lr=0.01,
        settings={"vector_length": 32, "num_vectors": 64},
        peft=Peft("VBLoRAConfig"),
        beside_peft='the same function with start="peft"; PEFT\'s output at init is moved',
    )
    prepares_together = True

    r: int = 4
    """Rank, at least 1."""
    num_vectors: int = 256
    """h, the number of vectors in the bank, at least topk."""
    vector_length: int = 256
    """b, the length of a vector of the bank, which divides d_in and d_out."""
    topk: int = 2
    """k, the number of vectors that make up a sub-vector, from 2 to num_vectors."""
    start: str = "exact"
    """Whether the start is subtracted: "exact"; or "peft", where it is not, as in the authors'
    code, and the output at init is moved."""

    def __post_init__(self):
        for name in ("r", "num_vectors", "vector_length", "topk"):
            check_rank(self, name)
        check_choice(self, "start", ("exact", "peft"))
        if not 2 <= self.topk <= self.num_vectors:
            raise LoraFuncError(
                f"VBLoRA(topk={self.topk}, num_vectors={self.num_vectors}): topk must be at least "
                "2, or the logits had no gradient, and at most num_vectors"
            )
        if self.start == "peft":
            amend_card(self, at_init="moved")

    @property
    def lr_scale(self):
        return {"logits_A": 10.0, "logits_B": 10.0}

    def init(self, weight, generator, stats=None):
        check_divides(self, "vector_length", weight.shape)
        o, i = (d // self.vector_length for d in weight.shape)
        A = normal((self.r, i, self.num_vectors), 0.1, generator)
        B = normal((o, self.r, self.num_vectors), 0.1, generator)
        return self.anchored({"logits_A": A, "logits_B": B})

    def init_shared(self, weights, generator):
        bank = uniform((self.num_vectors, self.vector_length), 0.02, generator)
        return self.anchored({"bank": bank})

    def anchored(self, start):
        """The leaves at their start, and it as the frozen ones that are subtracted."""
        if self.start == "peft":
            return Params(start)
        frozen = {f"{name}0": t for name, t in start.items()}
        return Params({name: t.clone() for name, t in start.items()}, frozen=frozen)

    def pair(self, params):
        names = ("logits_A", "logits_B", "bank")
        A, B = self.matrices(*(params[name] for name in names))
        if self.start == "peft":
            return A, B
        start = (params[f"{name}0"].to(params[name].dtype) for name in names)
        return low_rank_difference(A, B, *self.matrices(*start))

    def matrices(self, logits_A, logits_B, bank):
        """A and B."""
        A = composed(logits_A, bank, self.topk).flatten(1)
        return A, composed(logits_B, bank, self.topk).mT.flatten(0, 1)
