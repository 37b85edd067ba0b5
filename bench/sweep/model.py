"""The base: a language model that returns the loss of each answer, for rows of many examples.

A member's examples stand side by side in one row of the batch. So the example axis of the leaves
has one entry for each member, whatever the number of its examples: nothing is selected, and what a
variant prepares is prepared once for each member. Only attention looks at the examples apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_func.demo.model import load_model

APART = "examples_apart"


class Output(NamedTuple):
    """`loss` is the mean over all answers' tokens; `nll [rows, T]` has one for each token."""

    loss: Tensor
    nll: Tensor


class Answers(nn.Module):
    """A causal language model, of which only the answers' tokens reach the head."""

    def __init__(self, lm: Any):
        super().__init__()
        AttentionInterface.register(APART, attend_apart)
        lm.set_attn_implementation(APART)
        self.lm = lm

    def forward(
        self, ids: Tensor, labels: Tensor, at: Tensor, examples: int, attention_mask: Any = None
    ) -> Output:
        """`ids [rows, examples * T]`; `labels` are the tokens to predict at the flat places `at`.

        `attention_mask` is for `lf.collect`; right of an example there is nothing to mask.
        """
        T = ids.shape[1] // examples
        positions = torch.arange(T, device=ids.device).repeat(examples)[None]
        hidden = self.lm.get_decoder()(
            input_ids=ids, position_ids=positions, use_cache=False, examples=examples
        ).last_hidden_state
        logits = self.lm.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, at))
        nll = F.cross_entropy(logits.float(), labels, reduction="none")
        every = nll.new_zeros(ids.numel()).index_put((at,), nll).view(ids.shape)
        return Output(nll.mean(), every)


def attend_apart(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    examples: int = 1,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention `[rows, heads, examples * T, d]` in which no example sees another."""

    def apart(x: Tensor) -> Tensor:
        return x.unflatten(2, (examples, -1)).transpose(1, 2).flatten(0, 1)

    rest.pop("position_ids", None)
    out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, apart(query), apart(key), apart(value), None, **rest
    )
    return out.unflatten(0, (-1, examples)).flatten(1, 2), None


def load(name: str | None, device: str, quantization: str) -> tuple[Answers, Any, str]:
    """`(frozen base, tokenizer, description)`."""
    lm, tokenizer, description = load_model(name)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    nn.Module.to(lm, device=device, dtype=dtype)
    fuse_norms(lm)
    if quantization == "nf4":
        quantize(lm, dtype, device)
    return Answers(lm.eval().requires_grad_(False)), tokenizer, description


def fuse_norms(lm: nn.Module) -> None:
    """Puts torch's fused RMSNorm in the place of the model's: one kernel instead of six."""
    for path, module in list(lm.named_modules()):
        eps = getattr(module, "variance_epsilon", None)
        if eps is None or not type(module).__name__.endswith("RMSNorm"):
            continue
        weight: Any = module.weight
        fused = nn.RMSNorm(weight.shape[0], eps=eps, device="meta")
        fused.weight = weight
        parent, _, name = path.rpartition(".")
        setattr(lm.get_submodule(parent), name, fused)


def quantize(lm: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Packs the linear layers of the blocks into nf4, in place."""
    import bitsandbytes as bnb  # noqa: PLC0415  (only this needs it)

    for path, module in list(lm.named_modules()):
        if not isinstance(module, nn.Linear) or module is lm.get_output_embeddings():  # pyright: ignore
            continue
        packed = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            module.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
        )
        packed.load_state_dict(module.state_dict())
        parent, _, name = path.rpartition(".")
        setattr(lm.get_submodule(parent), name, packed.to(device))
