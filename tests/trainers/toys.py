"""What the tests of trainers share: a base, an adapter on it, data, and a loop written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from models import VOCABULARY, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import lora_func as lf

STEPS, HALF = 6, 3
ROWS = 4  # of a batch
WARMUP = 2  # steps
RATE, DECAY, CLIP = 1e-2, 0.1, 0.2  # the gradients of these models have norms of 0.2 to 0.8
Q_V = lf.Targets(names=(r"[qv]_proj$",))
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
WORDS = [f"w{i}" for i in range(VOCABULARY - len(SPECIAL))]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def base() -> Any:
    """The model, which is the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_llama()


def adapted(
    variant: lf.Variant | None = None, seed: int = 1, model: Any = None, **options: Any
) -> tuple[Any, lf.Adapter, dict[str, Tensor]]:
    """The model, and an adapter of it that starts from `seed`."""
    model = base() if model is None else model
    options = {"targets": Q_V, "generator": torch.Generator().manual_seed(seed), **options}
    return model, *lf.adapt(model, variant or lf.LoRA(r=4), **options)


def copies(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values that the leaves have now."""
    return {key: leaf.detach().clone() for key, leaf in params.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The values that the weights of a model have now."""
    return copies(dict(model.named_parameters()))


def rows(count: int = STEPS * ROWS) -> list[dict[str, list[int]]]:
    """Token ids with labels, all of one length."""
    ids = torch.randint(5, VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def batches() -> list[dict[str, Tensor]]:
    """The batches of `rows`, in their order."""
    stacked = torch.tensor([row["input_ids"] for row in rows()])
    return [{"input_ids": ids, "labels": ids} for ids in stacked.split(ROWS)]


def schedule(step: int) -> float:
    """A linear warmup and a linear decay, as factors of the learning rate."""
    return min(step / WARMUP, (STEPS - step) / (STEPS - WARMUP))


def by_hand(
    params: Mapping[str, Tensor],
    batches: Iterable[Any],
    loss: Callable[[dict[str, Tensor], Any], Tensor],
    schedule: Callable[[int], float] = schedule,
) -> dict[str, Tensor]:
    """The leaves after a training that uses nothing but torch and the functional call."""
    leaves = {key: leaf.requires_grad_() for key, leaf in copies(params).items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=RATE, weight_decay=DECAY)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for batch in batches:
        optimizer.zero_grad()
        loss(leaves, batch).backward()
        torch.nn.utils.clip_grad_norm_(leaves.values(), CLIP)
        optimizer.step()
        rates.step()
    return copies(leaves)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def text(seed: int) -> str:
    """A few words."""
    drawn = torch.randint(len(WORDS), (6,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in drawn)
