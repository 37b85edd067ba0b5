"""Problems and text as tokens: what is trained on, in which order, and what is evaluated."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_func import LoraFuncError

from .protocol import Sweep


class Problem(NamedTuple):
    """Tokens of a question and its answer."""

    tokens: list[int]
    start: int  # of the answer
    question: str
    answer: str


@dataclass(frozen=True)
class Data:
    """What all groups share."""

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    text: list[Problem]
    arithmetic: list[Problem]


def prompt(question: str) -> str:
    """What the model is asked."""
    return f"Question: {question}\nAnswer: "


def read(folder: Path, name: str) -> list[dict[str, str]]:
    """The lines of a file. Raises LoraFuncError if there is none."""
    path = folder / name
    if not path.is_file():
        raise LoraFuncError(
            f"there is no file {str(path)!r}; expected JSON lines with 'question' and 'answer'"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def encode(tokenizer: Any, rows: list[dict[str, str]], length: int) -> list[Problem]:
    """The problems of at most `length` tokens. The answer ends with the end-of-text token."""
    asked = tokenizer([prompt(row["question"]) for row in rows]).input_ids
    answers = tokenizer([row["answer"] for row in rows], add_special_tokens=False).input_ids
    problems = [
        Problem([*a, *b, tokenizer.eos_token_id], len(a), row["question"], row["answer"])
        for row, a, b in zip(rows, asked, answers)
    ]
    return [problem for problem in problems if len(problem.tokens) <= length]


def load(tokenizer: Any, options: Sweep) -> Data:
    """Validation is the end of train.jsonl; test and text are the beginning of theirs."""
    folder, length, validation = options.data, options.length, options.validation
    train = encode(tokenizer, read(folder, "train.jsonl"), length)
    held_out = encode(tokenizer, read(folder, "test.jsonl"), length)
    if len(train) <= validation or not held_out:
        raise LoraFuncError(
            f"{str(folder)!r} holds {len(train)} problems of at most {length} tokens to train on, "
            f"and {validation} are for validation: give more data, or less --validation"
        )
    return Data(
        train=train[:-validation],
        validation=train[-validation:],
        test=held_out[: options.test],
        text=passages(tokenizer, prose(), options.text),
        arithmetic=encode(tokenizer, arithmetic(1000), length),
    )


def prose() -> str:
    """A text that is at hand everywhere: the reference of the Python language, in its release."""
    from pydoc_data.topics import topics  # noqa: PLC0415  (700 kB, which only this needs)

    return "\n\n".join(topics[name] for name in sorted(topics))


def passages(tokenizer: Any, text: str, count: int, length: int = 256) -> list[Problem]:
    """`count` passages from all over the text. All but the first token of each are predicted."""
    step = len(text) // count
    cut = [text[i * step : i * step + 8 * length] for i in range(count)]
    rows = [tokenizer(part, add_special_tokens=False).input_ids[:length] for part in cut]
    return [Problem(row, 1, "", "") for row in rows if len(row) > 1]


def arithmetic(count: int) -> list[dict[str, str]]:
    """Problems of one step, of which a small model solves some. Always the same."""
    rng = random.Random(0)
    made = []
    for _ in range(count):
        name = rng.choice(("Ada", "Ben", "Chloe", "Dev", "Elif", "Femi", "Grace", "Hugo"))
        thing = rng.choice(("apples", "books", "eggs", "marbles", "pencils", "stamps"))
        a, b = rng.randint(3, 30), rng.randint(2, 9)
        question, result = rng.choice(
            (
                (f"{name} has {a} {thing} and gets {b} more. How many are there now?", a + b),
                (f"{name} has {a + b} {thing} and gives {b} away. How many are left?", a),
                (f"{name} has {b} boxes with {a} {thing} each. How many are there?", a * b),
            )
        )
        made.append({"question": question, "answer": f"#### {result}"})
    return made


def orders(lengths: list[int], steps: int, batch: int, seeds: int) -> Tensor:
    """Which problems each seed sees in each step, `[seeds, steps, batch]`.

    Every seed draws problems of its own, without repetition while there are enough. A batch holds
    problems of similar length, and all seeds see batches of similar length in the same step, so
    that little is padded. A seed sees the same problems in every group and at every learning rate.
    """
    needed = steps * batch
    shuffled = torch.randperm(steps, generator=torch.Generator().manual_seed(0))
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(1000 + seed)
        drawn: list[int] = []
        while len(drawn) < needed:
            drawn += torch.randperm(len(lengths), generator=generator).tolist()
        by_length = sorted(drawn[:needed], key=lambda i: lengths[i])
        found.append(torch.tensor(by_length).view(steps, batch)[shuffled])
    return torch.stack(found)


def pack(rows: list[list[Problem]], multiple: int = 16) -> tuple[Tensor, Tensor]:
    """Ids and labels `[rows, problems * T]`; each problem is padded on the right to T tokens.

    A label stands where its token is predicted. -100: none.
    """
    longest = max(len(problem.tokens) for row in rows for problem in row)
    T = -(-longest // multiple) * multiple
    ids = torch.zeros(len(rows), len(rows[0]), T, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        for j, (tokens, start, *_) in enumerate(row):
            ids[i, j, : len(tokens)] = torch.tensor(tokens)
            labels[i, j, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
    return ids.flatten(1), labels.flatten(1)


def batch(rows: list[list[Problem]], of_member: list[int], device: torch.device) -> dict[str, Any]:
    """What `model.Answers` is called with: for each member one of the rows."""
    ids, labels = (t[of_member] for t in pack(rows))
    at = (labels.flatten() >= 0).nonzero()[:, 0]  # here, because a GPU would have to be waited for
    tensors = {"ids": ids, "labels": labels.flatten()[at], "at": at}
    if device.type == "cuda":  # from pinned memory, a copy does not wait for the GPU either
        tensors = {name: t.pin_memory() for name, t in tensors.items()}
    moved = {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
    return {**moved, "examples": len(rows[0])}
