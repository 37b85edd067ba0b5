"""What training an adapter takes, counted without weights and without a GPU.

    python -m lora_func.calculator --model Qwen/Qwen3-0.6B --variant dora --r 16

The model stands on the device "meta", where a tensor has a shape and no data. It is adapted there,
and takes one step: a forward and a backward. `Live` notes when each tensor is made and when it is
freed. So the figures come from the code that trains, not from a formula.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lora_func as lf

from ..engine.batch import call_arguments
from ..libraries.cuda_kernels import AsOnCUDA, asks_about_data
from ..probing import floating

MiB = 2**20
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes of a number in NF4 with double quantization (QLoRA, arXiv 2305.14314, section 3)."""


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it, for as long as each lives."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if asks_about_data(func, args):
            return True  # as on a batch without padding, which is what a model asks for
        self.note((args, kwargs), counted=False)  # what is new here was there before
        out = func(*args, **(kwargs or {}))
        self.note(out, counted=True)
        return out

    def note(self, tensors: Any, *, counted: bool) -> None:
        """Notes each storage that is seen for the first time."""
        for t in pytree.tree_leaves(tensors):
            if isinstance(t, Tensor) and (key := id(t.untyped_storage())) not in self.storages:
                storage = t.untyped_storage()
                size = storage.nbytes() if counted else 0
                self.storages[key] = weakref.ref(storage, partial(self.freed, key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def freed(self, key: int, size: int, _: Any) -> None:
        """A storage is gone."""
        del self.storages[key]
        self.now -= size


@dataclass(frozen=True)
class Step:
    """Bytes that a forward and a backward take, beyond all that was there before."""

    kept: int
    """Alive after the forward: what autograd keeps for the backward."""
    peak: int
    """The most that is alive at a time, gradients included."""


@dataclass(frozen=True)
class Cost:
    """What training takes, in bytes where it says nothing else. Printed, it is a table."""

    trainable: int
    """Number of trainable parameters."""
    parameters: int
    """Number of parameters of the base."""
    weights: int
    """The base as it is: its parameters and buffers."""
    nf4: int
    """The base with its linear layers in 4 bits, all but the output layer. An estimate."""
    adapter: int
    """The trainable parameters and the frozen constants; also the size of a file."""
    moments: int
    """The two moments of Adam."""
    base: Step
    """A step of the base alone: a backward to its input."""
    adapted: Step
    """A step of training."""

    @property
    def total(self) -> int:
        """The peak of a training run with Adam."""
        return self.weights + self.adapter + self.moments + self.adapted.peak

    def __str__(self) -> str:
        kept = self.adapted.kept
        sizes = {
            "weights of the base": self.weights,
            "adapter": self.adapter,
            "Adam's moments": self.moments,
            "kept for backward: the base": self.base.kept,
            "kept for backward: the adapter": kept - self.base.kept,
            "backward, with gradients": self.adapted.peak - kept,
            "peak of training": self.total,
            "the same on a base in NF4": self.total - self.weights + self.nf4,
        }
        share = f"{self.trainable:,} of {self.parameters:,} parameters are trained"
        lines = [f"{share} ({self.trainable / self.parameters:.2%})"]
        lines += [f"{name:<32}{size / MiB:>10,.1f} MiB" for name, size in sizes.items()]
        return "\n".join(lines)


def calculate(
    adapter: lf.Adapter, model: nn.Module, params: Mapping[str, Tensor], batch: Any
) -> Cost:
    """What a step of training takes: all on the device "meta", or all with data.

    The loss is the output's `loss`, otherwise the mean square of the outputs.
    """
    leaves = {key: leaf.detach().requires_grad_() for key, leaf in params.items()}
    held = [t.detach() for t in (*model.parameters(), *model.buffers())]
    packed = [layer.weight for layer in linear_layers(model)]
    args, kwargs = call_arguments(with_gradients(model, batch))
    inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    wanted = [t for t in inputs if t.requires_grad]
    return Cost(
        trainable=sum(leaf.numel() for leaf in leaves.values()),
        parameters=sum(p.numel() for p in model.parameters()),
        weights=size_of(held),
        nf4=size_of(held) - size_of(packed) + round(NF4 * sum(w.numel() for w in packed)),
        adapter=size_of(leaves.values()) + size_of(adapter.frozen.values()),
        moments=2 * size_of(leaves.values()),
        base=step(lambda: loss_of(model(*args, **kwargs)), wanted),
        adapted=step(lambda: loss_of(adapter(model, leaves, batch)), list(leaves.values())),
    )


def step(
    forward: Callable[[], Tensor], wanted: Sequence[Tensor], toward: Tensor | None = None
) -> Step:
    """Runs a forward and a backward to `wanted`, and counts.

    `toward` is the gradient of what the forward returns; None is for a loss.
    """
    with Live() as live, AsOnCUDA():
        out = forward()
        kept = live.now
        _grads = torch.autograd.grad(out, wanted, toward, allow_unused=True)
    return Step(kept=kept, peak=live.peak)


def loss_of(out: Any) -> Tensor:
    """The output's `loss`, otherwise the mean square of the outputs."""
    loss = getattr(out, "loss", None)
    if loss is not None:
        return loss
    return torch.stack([t.float().square().mean() for t in floating(out)]).sum()


def with_gradients(model: nn.Module, batch: Any) -> Any:
    """The batch with inputs that require grad: embeddings, where it has ids of tokens."""
    if isinstance(batch, dict) and "input_ids" in batch:
        others = {key: t for key, t in batch.items() if key != "input_ids"}
        embedded = model.get_input_embeddings()(batch["input_ids"])  # pyright: ignore
        batch = {"inputs_embeds": embedded, **others}

    def required(t: Any) -> Any:
        floats = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().requires_grad_() if floats else t

    return pytree.tree_map(required, batch)


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """What a quantizer packs: the linear layers, but not the one that makes the logits."""
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not outputs]


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(t.nbytes for t in tensors)
