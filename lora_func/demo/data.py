"""Questions and answers to train on: a local folder, GSM8K from the hub, or word problems made here."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset
from huggingface_hub import HfApi

from ..errors import LoraFuncError


@dataclass(frozen=True)
class Example:
    question: str
    answer: str


def find_examples(
    folder: Path | None, train: int, held_out: int, seed: int
) -> tuple[list[Example], list[Example], str]:
    """`(examples to train on, others to evaluate on, where they come from)`.

    A folder holds `train.jsonl` with lines `{"question": .., "answer": ..}`, and `test.jsonl` or else its last lines are held
    out. Without one, `openai/gsm8k` from the hub where that answers, else problems from `word_problems`.
    """
    if folder is not None:
        rows = read_lines(folder / "train.jsonl")
        others = (
            read_lines(folder / "test.jsonl")
            if (folder / "test.jsonl").is_file()
            else rows[-held_out:]
        )
        rows = rows if (folder / "test.jsonl").is_file() else rows[:-held_out]
        source = f"{folder}"
    elif (splits := from_hub()) is not None:
        rows, others = splits
        source = "openai/gsm8k from the hub"
    else:
        made = word_problems(train + held_out, seed)
        rows, others = made[:train], made[train:]
        source = "word problems made by lora_func (the hub did not answer; --data takes a folder with train.jsonl)"
    if not rows or not others:
        raise LoraFuncError(f"{source}: too few examples to train on and to hold {held_out} out")
    shuffle = random.Random(seed).sample
    return shuffle(rows, min(train, len(rows))), others[:held_out], source


def read_lines(path: Path) -> list[Example]:
    """One JSON object a line. Raises LoraFuncError with the file and line where it is not as expected."""
    if not path.is_file():
        raise LoraFuncError(
            f"there is no file {str(path)!r}; expected JSON lines with 'question' and 'answer'"
        )
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            examples.append(Example(row["question"], row["answer"]))
        except (ValueError, KeyError, TypeError) as error:
            raise LoraFuncError(
                f"{path}:{number}: expected an object with 'question' and 'answer' ({error!r})"
            ) from error
    return examples


def from_hub() -> tuple[list[Example], list[Example]] | None:
    """Train and test split of GSM8K (Cobbe et al. 2021, arXiv 2110.14168), or None, saying why, where it cannot be had."""
    try:
        HfApi().dataset_info("openai/gsm8k", timeout=5)
        splits: list[Any] = [
            load_dataset("openai/gsm8k", "main", split=name) for name in ("train", "test")
        ]
    except Exception as error:  # no network, offline mode, a proxy, a full disk: each has an exception class of its own
        print(f"openai/gsm8k: the hub did not answer ({type(error).__name__}: {error})")
        return None
    train, test = (
        [Example(**{name: row[name] for name in ("question", "answer")}) for row in split]
        for split in splits
    )
    return train, test


NAMES = (
    "Ada",
    "Ben",
    "Chloe",
    "Dev",
    "Elif",
    "Femi",
    "Grace",
    "Hugo",
    "Ines",
    "Jun",
    "Kofi",
    "Lena",
    "Mateo",
    "Noor",
    "Olga",
)
THINGS = (
    "apples",
    "books",
    "candles",
    "eggs",
    "marbles",
    "notebooks",
    "oranges",
    "pencils",
    "seashells",
    "stamps",
    "tickets",
)
PLACES = (
    "at the market",
    "in the garden",
    "at the library",
    "on the beach",
    "at school",
    "in the workshop",
)


def word_problems(count: int, seed: int) -> list[Example]:
    """Arithmetic word problems with worked answers that end in "#### N", the same for the same seed."""
    rng = random.Random(seed)
    return [rng.choice((shopping, sharing, saving, packing))(rng) for _ in range(count)]


def shopping(rng: random.Random) -> Example:
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    number, price = rng.randint(3, 20), rng.randint(2, 9)
    paid = -(-number * price // 50) * 50
    return Example(
        f"{name} buys {number} {thing} {place} at ${price} each and pays with ${paid}. How much change does {name} get?",
        f"The {thing} cost {number} * {price} = ${number * price}.\n"
        f"The change is {paid} - {number * price} = ${paid - number * price}.\n#### {paid - number * price}",
    )


def sharing(rng: random.Random) -> Example:
    name, friend, thing = *rng.sample(NAMES, 2), rng.choice(THINGS)
    start, times = rng.randint(4, 30), rng.randint(2, 5)
    given = rng.randint(1, start - 1)
    return Example(
        f"{name} has {start} {thing}. {friend} has {times} times as many. If {name} gives {given} of them to {friend}, how "
        f"many {thing} does {friend} have then?",
        f"{friend} has {times} * {start} = {times * start} {thing}.\n"
        f"With {given} more there are {times * start} + {given} = {times * start + given}.\n#### {times * start + given}",
    )


def saving(rng: random.Random) -> Example:
    name = rng.choice(NAMES)
    weekly, weeks, spent = rng.randint(5, 25), rng.randint(4, 12), rng.randint(5, 20)
    return Example(
        f"{name} saves ${weekly} every week for {weeks} weeks and then spends ${spent}. How much money is left?",
        f"After {weeks} weeks there are {weekly} * {weeks} = ${weekly * weeks}.\n"
        f"After spending there are {weekly * weeks} - {spent} = ${weekly * weeks - spent}.\n#### {weekly * weeks - spent}",
    )


def packing(rng: random.Random) -> Example:
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    boxes, each, broken = rng.randint(3, 15), rng.randint(4, 12), rng.randint(1, 6)
    return Example(
        f"There are {boxes} boxes with {each} {thing} each {place}. {broken} of the {thing} are damaged. How many are not?",
        f"There are {boxes} * {each} = {boxes * each} {thing}.\n"
        f"Not damaged are {boxes * each} - {broken} = {boxes * each - broken}.\n#### {boxes * each - broken}",
    )
