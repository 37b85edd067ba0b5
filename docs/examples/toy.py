"""A tiny Llama with random weights, and sequences that count, for all examples.

Put your own model and data in their place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def language_model(**changes) -> Any:
    """The same model at every call. `changes` are fields of its config."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(**{**sizes, **changes})
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def counting(n, step: int | list[int] | torch.Tensor = 1, length=16, seed=0):
    """Token ids `[n, length]`: start, start + step, start + 2 step, ..

    `step` is one integer, or one for each sequence.
    """
    start = torch.randint(
        VOCABULARY, (n, 1), generator=torch.Generator().manual_seed(seed)
    )
    return (
        start + torch.as_tensor(step).reshape(-1, 1) * torch.arange(length)
    ) % VOCABULARY


def loss_per_example(logits, ids):
    """Mean cross-entropy of each sequence, `[n]`.

    transformers gives one for the whole batch.
    """
    return F.cross_entropy(
        logits[:, :-1].mT, ids[:, 1:], reduction="none"
    ).mean(1)
