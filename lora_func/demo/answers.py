"""Questions as tokens, the loss of the answers, and the answers that are right."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_func as lf

from ..errors import LoraFuncError
from .data import Example


def prompt(example: Example) -> str:
    """What the model is asked."""
    return f"Question: {example.question}\nAnswer: "


def answered(tokenizer: Any, examples: list[Example], length: int) -> list[Example]:
    """The examples that still hold a part of their answer when cut at `length` tokens.

    Raises LoraFuncError if there are none.
    """
    kept = [e for e in examples if len(tokenizer(prompt(e)).input_ids) < length]
    if not kept:
        raise LoraFuncError(
            f"length={length} cuts off the answer of every example, so there is nothing to learn; "
            "give a larger --length"
        )
    if len(kept) < len(examples):
        left_out = len(examples) - len(kept)
        print(f"left out {left_out} of {len(examples)}: the question alone fills {length} tokens")
    return kept


def encode(tokenizer: Any, examples: list[Example], length: int) -> dict[str, Tensor]:
    """Ids, mask and labels, padded on the right. The labels cover the answers alone."""
    rows, starts = [], []
    for example in examples:
        asked = tokenizer(prompt(example)).input_ids
        answered = tokenizer(example.answer, add_special_tokens=False).input_ids
        rows.append([*asked, *answered, tokenizer.eos_token_id][:length])
        starts.append(len(asked))
    ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (row, start) in enumerate(zip(rows, starts)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, start : len(row)] = torch.tensor(row[start:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def nats(
    adapter: lf.Adapter,
    model: Any,
    params: dict[str, Tensor],
    batch: dict[str, Tensor],
    members: int = 1,
) -> Tensor:
    """The loss of each token of the answers, `[members, tokens]`.

    With several members, the leaves have the example axis: every member sees the whole batch.
    """
    labels = batch["labels"][:, 1:]
    inputs = {name: batch[name].repeat(members, 1) for name in ("input_ids", "attention_mask")}
    each = 1 if members == 1 else len(labels)
    out = adapter(model, params, inputs, each=each)
    logits = out.logits[:, :-1]  # [members * rows, T - 1, vocabulary]
    given = logits[(labels >= 0).repeat(members, 1)].float()
    wanted = labels[labels >= 0].repeat(members)
    return F.cross_entropy(given, wanted, reduction="none").view(members, -1)


def solution(text: str) -> str:
    """The first number after "####", or else the last number, or else the whole text."""
    _, marked, after = text.partition("####")
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", after if marked else text)
    return found[0 if marked else -1].replace(",", "").rstrip(".") if found else text.strip()


class Solved(NamedTuple):
    """Completions of held-out questions, and which of them are right."""

    completions: list[str]
    right: list[bool]

    @property
    def exact_match(self) -> dict[str, Any]:
        """How many are right, of how many, and Wilson's 95 % interval of the share."""
        right, of = sum(self.right), len(self.right)
        return {"right": right, "of": of, "interval": wilson(right, of)}


@torch.no_grad()
def solve(model: Any, tokenizer: Any, examples: list[Example]) -> Solved:
    """Answers all questions in one batch, by greedy decoding with the KV cache.

    A completion may be a few tokens longer than the longest of the true answers.
    """
    rows = [tokenizer(prompt(example)).input_ids for example in examples]
    answers = [tokenizer(e.answer, add_special_tokens=False).input_ids for e in examples]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):  # padded on the left: all go on at the same place
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = torch.tensor(row), 1
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max(map(len, answers)) + 8,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    right = [solution(text) == solution(e.answer) for text, e in zip(texts, examples)]
    return Solved(texts, right)


def wilson(right: int, of: int) -> list[float]:
    """The 95 % interval of a share (Wilson 1927)."""
    z, p = 1.96, right / of
    centre = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return [max(0.0, centre - half), min(1.0, centre + half)]
