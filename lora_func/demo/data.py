"""Questions and answers to train on, from a folder, from the hub, or generated."""

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
    """A question and its answer."""

    question: str
    answer: str


GENERATED = "generated"
GSM8K = "openai/gsm8k"


def find_examples(
    name: str, train: int, held_out: int, seed: int
) -> tuple[list[Example], list[Example], str]:
    """`(examples to train on, others to evaluate on, where they come from)`.

    "generated" makes `word_problems`, and "openai/gsm8k" is that data set from the hub. Everything
    else is a folder that holds `train.jsonl` with lines `{"question": .., "answer": ..}`. The
    examples to evaluate on come from its `test.jsonl`, or are the last lines of `train.jsonl`.
    """
    source = name
    if name == GENERATED:
        made = word_problems(train + held_out, seed)
        rows, others = made[:train], made[train:]
        source = "word problems made by lora_func"
    elif name == GSM8K:
        rows, others = from_hub()
        source = f"{GSM8K} from the hub"
    else:
        folder = Path(name)
        rows = read_lines(folder / "train.jsonl")
        if (folder / "test.jsonl").is_file():
            others = read_lines(folder / "test.jsonl")
        else:
            rows, others = rows[:-held_out], rows[-held_out:]
    if not rows or not others:
        raise LoraFuncError(f"{source}: too few examples to train on and to hold {held_out} out")
    shuffle = random.Random(seed).sample
    return shuffle(rows, min(train, len(rows))), others[:held_out], source


def read_lines(path: Path) -> list[Example]:
    """The examples in a file with one JSON object a line.

    Raises LoraFuncError if the file is missing, or names the line that holds something else.
    """
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


def from_hub() -> tuple[list[Example], list[Example]]:
    """Train and test split of GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

    Raises LoraFuncError if the hub does not answer.
    """
    try:
        HfApi().dataset_info(GSM8K, timeout=5)
        splits: list[Any] = [load_dataset(GSM8K, "main", split=name) for name in ("train", "test")]
    except Exception as error:  # no network, offline mode, a proxy, a full disk: a class for each
        raise LoraFuncError(
            f"{GSM8K}: the hub did not answer ({type(error).__name__}: {error}); --data also takes "
            f"a folder with train.jsonl, or {GENERATED!r}"
        ) from error
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
    """Different arithmetic problems, with worked answers that end in "#### N", from a seed."""
    rng = random.Random(seed)
    made: dict[str, Example] = {}
    while len(made) < count:
        example = rng.choice((shopping, sharing, saving, packing))(rng)
        made.setdefault(example.question, example)
    return list(made.values())


def shopping(rng: random.Random) -> Example:
    """The change after a purchase."""
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    number, price = rng.randint(3, 20), rng.randint(2, 9)
    cost = number * price
    paid = -(-cost // 50) * 50
    return Example(
        f"{name} buys {number} {thing} {place} at ${price} each and pays with ${paid}. "
        f"How much change does {name} get?",
        f"The {thing} cost {number} * {price} = ${cost}.\n"
        f"The change is {paid} - {cost} = ${paid - cost}.\n#### {paid - cost}",
    )


def sharing(rng: random.Random) -> Example:
    """The sum after a gift."""
    name, friend, thing = *rng.sample(NAMES, 2), rng.choice(THINGS)
    start, times = rng.randint(4, 30), rng.randint(2, 5)
    given = rng.randint(1, start - 1)
    owned = times * start
    return Example(
        f"{name} has {start} {thing}. {friend} has {times} times as many. "
        f"If {name} gives {given} of them to {friend}, how many {thing} does {friend} have then?",
        f"{friend} has {times} * {start} = {owned} {thing}.\n"
        f"With {given} more there are {owned} + {given} = {owned + given}.\n#### {owned + given}",
    )


def saving(rng: random.Random) -> Example:
    """Weekly savings, less one expense."""
    name = rng.choice(NAMES)
    weekly, weeks, spent = rng.randint(5, 25), rng.randint(4, 12), rng.randint(5, 20)
    saved = weekly * weeks
    return Example(
        f"{name} saves ${weekly} every week for {weeks} weeks and then spends ${spent}. "
        "How much money is left?",
        f"After {weeks} weeks there are {weekly} * {weeks} = ${saved}.\n"
        f"After spending there are {saved} - {spent} = ${saved - spent}.\n#### {saved - spent}",
    )


def packing(rng: random.Random) -> Example:
    """The undamaged contents of some boxes."""
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    boxes, each, broken = rng.randint(3, 15), rng.randint(4, 12), rng.randint(1, 6)
    packed = boxes * each
    return Example(
        f"There are {boxes} boxes with {each} {thing} each {place}. "
        f"{broken} of the {thing} are damaged. How many are not?",
        f"There are {boxes} * {each} = {packed} {thing}.\n"
        f"Not damaged are {packed} - {broken} = {packed - broken}.\n#### {packed - broken}",
    )
