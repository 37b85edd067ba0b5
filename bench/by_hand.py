"""A small classifier with a LoRA: as a pure function, and as one wraps layers by hand."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import lora_func as lf

CLASSES = 3
VOCABULARY = 64
RANK = 2


@dataclasses.dataclass(frozen=True)
class Toy:
    """A frozen model, a LoRA on query and value as if trained, and a batch."""

    model: Any
    adapter: lf.Adapter
    params: dict[str, Tensor]
    ids: Tensor
    labels: Tensor

    def logits(
        self, params: Mapping[str, Tensor], ids: Tensor | None = None, each: int = 1
    ) -> Tensor:
        """`[examples, classes]`"""
        ids = self.ids if ids is None else ids
        return self.adapter(self.model, params, {"input_ids": ids}, each=each).logits

    def losses(self, params: Mapping[str, Tensor]) -> Tensor:
        """The loss of each example."""
        return F.cross_entropy(self.logits(params), self.labels, reduction="none")

    def each_gradient(self) -> dict[str, Tensor]:
        """The gradient of each example, leaves `[examples, *shape]`."""
        each = lf.expand(self.params, len(self.ids))
        return lf.value_and_grad(lambda each: self.losses(each).sum())(each)[1]

    def another(self, seed: int) -> dict[str, Tensor]:
        """Other parameters of the same adapter."""
        generator = torch.Generator().manual_seed(seed)
        return {
            key: leaf + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
            for key, leaf in self.params.items()
        }


def toy(
    hidden: int = 32,
    layers: int = 2,
    examples: int = 6,
    tokens: int = 8,
    dtype: torch.dtype = torch.float64,
) -> Toy:
    """The same at every call.

    A BERT, as it computes all in one dtype. Its attention is eager: torch lacks the forward
    derivative of fused attention on the CPU, which curvlinops takes.
    """
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_labels": CLASSES,
    }
    config = BertConfig(**sizes, attn_implementation="eager")  # pyright: ignore[reportCallIssue]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = BertForSequenceClassification(config)
        ids = torch.randint(1, VOCABULARY, (examples, tokens))
        labels = torch.randint(CLASSES, (examples,))
    model = nn.Module.to(model, dtype).eval().requires_grad_(False)
    targets = lf.Targets(names=(r"(query|value)$",))
    adapter, params = lf.adapt(
        model, lf.LoRA(r=RANK), targets=targets, generator=torch.Generator().manual_seed(1)
    )
    start = Toy(model, adapter, {k: leaf.to(dtype) for k, leaf in params.items()}, ids, labels)
    return dataclasses.replace(start, params=start.another(seed=2))


class LoraLinear(nn.Module):
    """The layer that users write: the base's, with two small ones beside it."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scale: float):
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(A.shape[1], A.shape[0], bias=False, dtype=A.dtype)
        self.lora_B = nn.Linear(B.shape[1], B.shape[0], bias=False, dtype=B.dtype)
        self.lora_A.weight.data.copy_(A)
        self.lora_B.weight.data.copy_(B)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x))


class Logits(nn.Module):
    """A model whose output is its logits, as libraries of curvature want it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, ids: Tensor) -> Tensor:
        return self.module(input_ids=ids).logits


def wrapped(own: Toy, params: Mapping[str, Tensor]) -> tuple[Any, dict[str, nn.Parameter]]:
    """A copy of the model with its layers replaced, and the trainable tensors by our keys."""
    model, leaves = copy.deepcopy(own.model), {}
    for path, variant in own.adapter.variants.items():
        A, B = params[f"{path}.lora_A"], params[f"{path}.lora_B"]
        scale: Any = getattr(variant, "scale")  # noqa: B009  (a LoRA's)
        layer = LoraLinear(model.get_submodule(path), A, B, scale)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
        leaves[f"{path}.lora_A"] = layer.lora_A.weight
        leaves[f"{path}.lora_B"] = layer.lora_B.weight
    return model, leaves


def functional(own: Toy, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """The logits of the wrapped model, as a function of one vector of its trainable tensors."""
    model, leaves = wrapped(own, own.params)
    names = {id(leaf): name for name, leaf in model.named_parameters()}

    def logits(flat: Tensor) -> Tensor:
        parts = flat.split([leaf.numel() for leaf in leaves.values()])
        state = {names[id(p)]: part.view_as(p) for part, p in zip(parts, leaves.values())}
        return torch.func.functional_call(model, state, kwargs={"input_ids": ids}).logits

    return logits


def flat(params: Mapping[str, Tensor]) -> Tensor:
    """One vector of all leaves, in the order of the dict."""
    return torch.cat([leaf.detach().reshape(-1) for leaf in params.values()])
