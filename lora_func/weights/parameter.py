"""The `Weight` of a parameter: a matrix, a stack of matrices, a kernel, or any other tensor."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..libraries import accelerate, fsdp, torch_hooks, transformers
from ..variant import Weight
from .layer import is_sparse


class Layout(NamedTuple):
    """How a parameter holds what a variant sees as `[d_out, d_in]`, or as a stack of such.

    A matrix `[d_out, d_in]`, and a stack of them `[E, d_out, d_in]`, is held as it is or with its
    last two axes swapped. A kernel of a convolution `[out, in, k, ..]` is the matrix
    `[out, in k ..]`; one of a transposed convolution `[in, out, k, ..]` holds the transpose of
    `[out k .., in]`. A tensor of another number of axes is no matrix.
    """

    stored: tuple[int, ...]  # the parameter's own shape
    transposed: bool = False
    kernel: bool = False

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Layout:
        """Of the parameter `name` of a module."""
        P: Any = module._parameters[name]
        lazy = isinstance(P, nn.UninitializedParameter)  # without a shape; see `problem`
        stored = () if lazy else tuple(P.shape)
        if torch_hooks.is_convolution(module) and name == "weight":
            return cls(stored, torch_hooks.is_transposed_convolution(module), kernel=True)
        conv1d = transformers.is_conv1d(module) and name == "weight"
        stack = len(stored) == 3 and transformers.holds_transposed(module, name)
        return cls(stored, conv1d or stack)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[d_out, d_in]`, `[E, d_out, d_in]`, or the stored shape of what is no matrix."""
        shape = self.stored
        if self.kernel:
            shape = (shape[0], torch.Size(shape[1:]).numel())
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix or a stack of matrices."""
        return self.kernel or len(self.stored) in (2, 3)

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of matrices."""
        return not self.kernel and len(self.stored) == 3

    def matrix(self, P: Tensor) -> Tensor:
        """A tensor in this layout as a variant sees it: a view of shape `shape`."""
        P = P.flatten(1) if self.kernel else P
        return P.mT if self.transposed else P

    def as_stored(self, W: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        return (W.mT if self.transposed else W).reshape(self.stored)


class ParameterWeight(Weight):
    """What a parameter holds, read from its module at the moment of asking. It has no bias."""

    def __init__(self, module: nn.Module, name: str, path: str):
        self.module = module
        self.name = name
        self.path = path  # of the parameter in its model
        self.layout = Layout.of(module, name)
        self.bias = None

    def held_by(self, module: nn.Module, name: str) -> ParameterWeight:
        """The same, for a module of another class that holds the parameter as `name`."""
        other = copy.copy(self)
        other.module, other.name = module, name
        return other

    @property
    def stored(self) -> Any:
        """The parameter itself."""
        return self.module._parameters[self.name]

    @property
    def matrix(self) -> Tensor:  # pyright: ignore  (an attribute of a plain Weight)
        return self.layout.matrix(self.stored)

    @property
    def shape(self) -> Any:  # (d_out, d_in), or what `Layout.shape` says
        return self.layout.shape

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def at_hand(self) -> bool:
        """Whether reading it moves nothing between devices. What is elsewhere is refused."""
        return True

    def as_stored(self, W: Tensor) -> Tensor:
        """The inverse of `matrix`, with the strides of a fresh tensor."""
        return self.layout.as_stored(W).contiguous()

    def problem(self) -> str | None:
        """Why the parameter cannot be adapted, as the rest of "'path' ..", or None."""
        stored, kind = self.stored, type(self.module).__name__
        if isinstance(stored, nn.UninitializedParameter):
            return f"of a {kind} has no values yet: run the model once, then adapt it"
        if torch_hooks.runs_children(self.module):
            return (
                f"of a {kind} cannot be adapted: it would stand among the parts that the {kind} "
                "counts and runs. Give it a module of its own"
            )
        if getattr(self.module, "max_norm", None) is not None:
            return (
                f"of a {kind} is written to in each call, which scales rows down to "
                f"max_norm={self.module.max_norm}, and an adapted one takes no write"
            )
        if accelerate.offloading(self.module) is not None:
            return (
                f"of a {kind} is offloaded by accelerate, which puts it into the module at each "
                "call and would overwrite the adapted one. Keep this module on a device"
            )
        if fsdp.is_sharded(stored):
            return (
                f"of a {kind} is sharded over ranks, and an adapter of a parameter needs the whole "
                "one. Adapt it before fully_shard, and leave its module out of the sharding"
            )
        packed = not stored.is_floating_point() or stored.dtype.itemsize == 1
        if packed or is_sparse(stored):
            return (
                f"of a {kind} is packed ({stored.dtype} of shape {tuple(stored.shape)}), and only "
                "a floating one can be adapted. Name its layer, if that is linear, as in "
                "Targets(names=..), or keep it out of quantization"
            )
        return None
