"""`capture`: a training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import LoraFuncError

WARM_UP = 3
"""Eager steps before the recording. In them libraries choose kernels and optimizers make state."""

CAUSES = {
    "capturable": "The optimizer counts its steps on the CPU: give it capturable=True.",
    "stream is capturing": (
        "The step waits for the GPU, as .item(), .tolist(), .cpu(), print(tensor), a boolean mask "
        "as an index, and gradient clipping with error_if_nonfinite=True do: leave that out."
    ),
}
"""How to fix it, by a part of PyTorch's message."""


class Captured:
    """What `capture` returns. `recorded` tells whether calls replay a graph by now."""

    def __init__(self, step: Callable[[Any], Any], example: Any) -> None:
        self.step = step
        self.example, self.structure = pytree.tree_flatten_with_path(plain(example))
        devices = {leaf.device for _, leaf in self.example if isinstance(leaf, Tensor)}
        if len(devices) != 1:
            given = ", ".join(sorted(map(str, devices))) or "none"
            raise LoraFuncError(
                f"the example batch must hold tensors, all on one device; its devices: {given}"
            )
        (self.device,) = devices
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Any] = []
        self.outputs: Any = None

    @property
    def recorded(self) -> bool:
        """Whether calls replay a CUDA graph."""
        return self.graph is not None

    def __call__(self, batch: Any) -> Any:
        """One step on a batch like the example."""
        leaves = self.check(batch)
        if self.device.type != "cuda":
            return self.on_cpu(batch)
        if self.calls < WARM_UP:
            outputs = self.warm_up(batch)
            self.calls += 1
            return outputs
        graph = self.graph = self.graph or self.record(leaves)
        for held, leaf in zip(self.inputs, leaves):
            if isinstance(held, Tensor):
                held.copy_(leaf)
        graph.replay()
        return copied(self.outputs)

    def check(self, batch: Any) -> list[Any]:
        """The leaves of the batch. Raises LoraFuncError if they are not like the example's."""
        given, structure = pytree.tree_flatten_with_path(plain(batch))
        if structure != self.structure:
            raise LoraFuncError(
                f"the batch has the structure {structure}, and the example has {self.structure}"
            )
        for (path, leaf), (_, wanted) in zip(given, self.example):
            if description(leaf) != description(wanted):
                raise LoraFuncError(
                    f"batch{pytree.keystr(path)} is {description(leaf)}, and in the example it is "
                    f"{description(wanted)}. A captured step takes one shape: pad the batches, or "
                    "capture a step for each shape"
                )
        return [leaf for _, leaf in given]

    def on_cpu(self, batch: Any) -> Any:
        """An eager step. Raises LoraFuncError if it ran on a GPU, which would not be captured."""
        outputs = self.step(batch)
        for path, leaf in pytree.tree_flatten_with_path(outputs)[0]:
            if isinstance(leaf, Tensor) and leaf.device.type == "cuda":
                raise LoraFuncError(
                    f"the step returns a tensor on {leaf.device} (output{pytree.keystr(path)}) for "
                    "a batch on the CPU: give capture a batch on the GPU"
                )
        return copied(outputs)

    def warm_up(self, batch: Any) -> Any:
        """A step on a stream of its own, as a recording will be."""
        here = torch.cuda.current_stream(self.device)
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            outputs = copied(self.step(batch))
        here.wait_stream(aside)
        return outputs

    def record(self, leaves: list[Any]) -> torch.cuda.CUDAGraph:
        """The step as a graph. The GPU does nothing meanwhile, so no tensor changes."""
        self.inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                self.outputs = self.step(pytree.tree_unflatten(self.inputs, self.structure))
        except RuntimeError as error:
            cause = next((fix for part, fix in CAUSES.items() if part in reasons(error)), "")
            raise LoraFuncError(
                f"the step cannot be captured as a CUDA graph. {cause} PyTorch says: {error}"
            ) from error
        return graph


def capture(step: Callable[[Any], Any], example_batch: Any) -> Captured:
    """`captured(batch) -> step(batch)`: a whole training step, replayed as one CUDA graph.

    `step` takes a batch, and does forward, backward and optimizer step. It returns a tree of
    tensors, such as the loss. Eager PyTorch launches each kernel of it from the CPU, and a fast GPU
    waits for that; a graph is one launch.

    Every call is one step. The first three run eagerly, because kernels must be chosen and the
    optimizer's state must exist. The fourth records the graph and replays it, as all later calls
    do. `example_batch` gives the shapes, and is not trained on. Results are detached copies.

    - Batches have the structure, shapes, dtypes and device of the example.
    - Python runs in the recording alone. What changes from step to step must be a tensor on the GPU
      that changes in place: `AdamW(lr=torch.tensor(1e-3, device=...), capturable=True)`, whose
      schedulers write to it. Call a scheduler outside of `step`.
    - Leaves, gradients and optimizer state keep their memory: change them in place, for instance
      with `leaf.copy_`.

    On a batch on the CPU, `step` runs eagerly in every call, with the same checks.

    Raises LoraFuncError if a batch differs from the example, and if the step cannot be captured,
    with the reason: it waits for the GPU, or the optimizer is not capturable.
    """
    return Captured(step, example_batch)


def plain(batch: Any) -> Any:
    """A mapping of any kind, such as a tokenizer's, as a dict."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def description(leaf: Any) -> str:
    """Shape, dtype and device of a tensor; the value of everything else."""
    if isinstance(leaf, Tensor):
        dtype = str(leaf.dtype).removeprefix("torch.")
        return f"{dtype} {list(leaf.shape)} on {leaf.device}"
    return repr(leaf)


def reasons(error: BaseException | None) -> str:
    """The messages of an error and of those behind it."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__context__
    return "\n".join(texts)


def copied(outputs: Any) -> Any:
    """The tree with copies of its tensors, without a graph: a replay overwrites the originals."""
    return pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, outputs
    )
