"""What the examples run on: a tiny Llama with random weights, and sequences that count. Put your own model and data here."""

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def language_model(**changes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return (
        LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **changes))
        .eval()
        .requires_grad_(False)
    )


def counting(n, step=1, length=16, seed=0):
    """`[n, length]` token ids: start, start + step, start + 2 step, ..; step is an integer, or one for each sequence."""
    start = torch.randint(VOCABULARY, (n, 1), generator=torch.Generator().manual_seed(seed))
    return (start + torch.as_tensor(step).reshape(-1, 1) * torch.arange(length)) % VOCABULARY


def loss_per_example(logits, ids):
    """Mean cross-entropy of each sequence, `[n]`: transformers' own loss is one number for the whole batch."""
    return F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)
