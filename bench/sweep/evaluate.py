"""What members know: the loss of answers, the loss of a text, and problems solved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import lora_func as lf

from .data import Problem, batch
from .model import APART, Answers

TOKENS = {"cuda": 2**16, "cpu": 2**13}  # in one pass of the base, of all members together


@torch.no_grad()
def losses(
    base: Answers,
    adapter: lf.Adapter | None,
    leaves: Mapping[str, Tensor],
    problems: Sequence[Problem],
) -> Tensor:
    """Nats of each answer, summed over its tokens: `[K, problems]`, in float64 on the CPU.

    Without an adapter, K is 1: the untrained base.
    """
    device = next(base.parameters()).device
    K = 1 if adapter is None else lf.population.size(leaves)
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].tokens))
    found = torch.zeros(K, len(problems), dtype=torch.float64)
    while order:
        T = len(problems[order[-1]].tokens)  # the longest first: memory is reserved once
        now = order[-max(1, TOKENS[device.type] // (K * T)) :]
        del order[-len(now) :]
        given = batch([[problems[i] for i in now]], [0] * K, device)
        out = base(**given) if adapter is None else adapter(base, leaves, given)
        found[:, now] = out.nll.unflatten(1, (len(now), -1)).sum(2).double().cpu()
    return found


def answer_tokens(problems: Sequence[Problem]) -> Tensor:
    """How many tokens each answer has, `[problems]`."""
    return torch.tensor([len(p.tokens) - p.start for p in problems], dtype=torch.float64)


def per_token(nats: Tensor, problems: Sequence[Problem]) -> list[float]:
    """Nats for a token of each member: over all tokens, so that a long answer counts for more."""
    return (nats.sum(1) / answer_tokens(problems).sum()).tolist()


def number(text: str) -> float | None:
    """The first number after ####, or else the last one."""
    _, marked, after = text.partition("####")
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", after if marked else text)
    return float(found[0 if marked else -1].replace(",", "")) if found else None


@torch.no_grad()
def solved(
    base: Answers,
    adapter: lf.Adapter | None,
    leaves: Mapping[str, Tensor],
    problems: Sequence[Problem],
    tokenizer: Any,
    *,
    new_tokens: int = 192,
) -> list[int]:
    """How many problems each member solves by greedy decoding: the number is the answer's."""
    K = 1 if adapter is None else lf.population.size(leaves)
    device = next(base.parameters()).device
    rows = [problem.tokens[: problem.start] for problem in problems]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = torch.tensor(row), 1
    view = base if adapter is None else lf.bind(adapter, base, leaves, each=len(rows))
    lm: Any = view.lm
    lm.set_attn_implementation("sdpa")
    try:
        out = lm.generate(
            input_ids=ids.repeat(K, 1).to(device),
            attention_mask=mask.repeat(K, 1).to(device),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    finally:
        lm.set_attn_implementation(APART)
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    right = [
        number(text) is not None and number(text) == number(problems[i % len(rows)].answer)
        for i, text in enumerate(texts)
    ]
    return [sum(right[k * len(rows) : (k + 1) * len(rows)]) for k in range(K)]
