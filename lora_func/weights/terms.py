"""A parameter with a low-rank change as terms, `base + left @ right`, whose sum is not formed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..errors import LoraFuncError
from ..libraries.functorch import in_transform, over_first_axis


@dataclass(frozen=True, kw_only=True)
class Terms:
    """`base + left @ right`, in the layout in which the parameter is stored."""

    base: Tensor  # [.., rows, cols], frozen; or kernels [rows, in, k, ..]
    left: Tensor  # [.., rows, r]
    right: Tensor  # [.., r, cols]; or kernels [r, in, k, ..]
    form: Callable[[], Tensor]  # makes the sum
    path: str  # of the parameter, for messages
    kernel: bool  # of a convolution
    n: int | None  # examples, on an axis in front of left and right
    repeats: Mapping[Any, int]  # rows that an example may have instead of one
    trains: bool  # whether left and right are to get gradients
    neighbours: int = 1  # matrices, one after the other, that share one matrix of base
    kept: dict[str, Any] = field(default_factory=dict)  # what is made at most once

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the sum. Without an axis for examples."""
        first, *rest = self.base.shape
        return (first * self.neighbours, *rest)

    @property
    def rank(self) -> int:
        """That of `left @ right`; it may be 0."""
        return self.left.shape[-1]

    def viewed(self, look: Callable[[Tensor], Tensor], **changed: Any) -> Terms:
        """The terms of `look(sum)`, given those that differ."""
        return replace(self, **changed, form=lambda: look(self.dense()), kept={})

    def dense(self) -> Tensor:
        """The sum, made once.

        Raises LoraFuncError if there is an example axis: each example has a sum of its own.
        """
        if self.n is not None or self.neighbours > 1:
            raise LoraFuncError(
                f"{self.path!r}: its module uses the parameter in a way that cannot tell the "
                "examples of a batch apart. Leave it out of the targets, or give it parameters "
                "without the example axis"
            )
        self.check_grad()
        if "sum" not in self.kept:
            self.kept["sum"] = uncounted(self.form)
        return self.kept["sum"]

    def plus(
        self,
        out: Tensor,
        x: Tensor,
        change: Callable[[Tensor, Tensor, Tensor], Tensor],
        axes: int = 2,
    ) -> Tensor:
        """`out + change(x, left, right)`, in the dtype of `out`.

        `left` and `right` come in the dtype of a floating x. With an example axis, they are those
        of one example, and x is its rows. Raises LoraFuncError if x does not have that axis;
        `axes` is the fewest that such an x has.
        """
        self.check_grad()
        left, right = self.left, self.right
        if self.rank == 0:
            return out
        if x.is_floating_point():
            left, right = left.to(x.dtype), right.to(x.dtype)
        if self.n is None:
            return out + change(x, left, right).to(out.dtype)
        self.check_examples(x, axes)
        rows = x.unflatten(0, (self.n, x.shape[0] // self.n))
        return out + over_first_axis(change, rows, left, right).flatten(0, 1).to(out.dtype)

    def check_grad(self) -> None:
        """Raises LoraFuncError if gradients are off, though the factors are to get some."""
        if self.trains and not torch.is_grad_enabled():
            raise LoraFuncError(
                f"gradients are switched off inside the model where it uses {self.path!r}, so its "
                "adapter would get none. With activation checkpointing, pass use_reentrant=False; "
                "otherwise leave it out of the targets, or call under torch.no_grad()"
            )

    def check_examples(self, x: Tensor, axes: int) -> None:
        """Raises LoraFuncError if the first axis of an operand is not that of the examples."""
        n = self.n or 0
        if x.dim() < axes or x.shape[0] not in (n, *(n * k for k in self.repeats.values())):
            raise LoraFuncError(
                f"{self.path!r} meets a tensor of shape {tuple(x.shape)}, whose first axis is not "
                f"that of the {n} examples of its parameters: the batch has another size, or the "
                "model moves its examples before (time first, tokens flattened, positions). Leave "
                "it out of the targets, or give it parameters without the example axis"
            )


def uncounted(make: Callable[[], Tensor]) -> Tensor:
    """`make()`, for a tensor that is kept.

    Activation checkpointing counts what is saved for backward, in both of its runs. Only one of
    them makes the tensor, so what that saves must not count.
    """
    if in_transform():  # which takes no hooks
        return make()
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        return make()


def are_terms(W: Any, *others: Any, kernel: bool = False) -> bool:
    """Whether W is terms, of a kernel or of matrices, and no other operand is."""
    one = isinstance(W, Terms) and W.kernel == kernel
    return one and not any(isinstance(other, Terms) for other in others)


# Views. Each takes a function of torch and its arguments, and returns the terms of the result, or
# NotImplemented: then the function is for the sum.


def index(function: Any, W: Any, key: Any) -> Any:
    """`W[key]`: matrices of a stack, or rows of a matrix by their ids."""
    keys = key if isinstance(key, tuple) else (key,)
    while len(keys) > 1 and isinstance(keys[-1], slice) and keys[-1] == slice(None):
        keys = keys[:-1]  # it takes a whole axis
    plain = all(k is None or type(k) in (int, slice) or is_ids(k) for k in keys)
    if not plain or not are_terms(W, *keys):
        return NotImplemented
    matrices = len(W.shape) - 2
    # With an example axis no: tables of positions are read so, which have no examples.
    if matrices == 0 and len(keys) == 1 and is_ids(keys[0]) and W.n is None:
        dtype = W.base.dtype
        rows = lambda ids, left, right: left[ids].to(dtype) @ right.to(dtype)  # noqa: E731
        return W.plus(W.base[keys[0]], keys[0], rows, axes=1)
    if sum(k is not None for k in keys) > matrices or W.n is not None:
        return NotImplemented
    return of_stack(W, keys[0] if len(keys) == 1 else keys)


def is_ids(key: Any) -> bool:
    """Whether a key is a tensor of integers."""
    return isinstance(key, Tensor) and key.dtype in (torch.int64, torch.int32)


def of_stack(W: Terms, key: Any) -> Any:
    """`W[key]`, where the key leaves the matrices whole."""
    left, right = W.left, W.right
    if is_ids(key) and key.dim() == 0 and not in_transform():
        key = int(key)  # once, because it waits for the device
    if type(key) is int:
        # Split at once: the backward of `left[e]` alone would fill a whole stack with zeros.
        if "split" not in W.kept:
            W.kept["split"] = left.unbind(0), right.unbind(0)
        left, right = W.kept["split"]
    if W.neighbours == 1:
        base = W.base[key]
    elif type(key) is int or is_ids(key):
        base = W.base[key // W.neighbours]
    else:
        return NotImplemented
    new = {"base": base, "left": left[key], "right": right[key], "neighbours": 1}
    return W.viewed(lambda t: t[key], **new)


def index_select(function: Any, W: Any, dim: int, ids: Tensor) -> Any:
    """`torch.index_select` along the first axis."""
    along = are_terms(W, ids) and dim % len(W.shape) == 0
    return index(function, W, ids.reshape(-1)) if along else NotImplemented


def unbind(function: Any, W: Any, dim: int = 0) -> Any:
    """The matrices of a stack, which `iter` asks for."""
    stack = are_terms(W) and len(W.shape) == 3 and W.n is None and dim % 3 == 0
    return tuple(of_stack(W, e) for e in range(W.shape[0])) if stack else NotImplemented


def transpose(function: Any, W: Any, *axes: int) -> Any:
    """`W.transpose(-2, -1)`, `W.mT`."""
    if not are_terms(W):
        return NotImplemented
    last = len(W.shape) - 1
    if {axis % (last + 1) for axis in axes or (-2, -1)} != {last - 1, last}:
        return NotImplemented
    return W.viewed(lambda t: t.mT, base=W.base.mT, left=W.right.mT, right=W.left.mT)


def transpose_matrix(function: Any, W: Any) -> Any:
    """`W.T`, `W.t()`."""
    return transpose(function, W) if are_terms(W) and len(W.shape) == 2 else NotImplemented


def convert(function: Any, W: Any, *args: Any, **options: Any) -> Any:
    """`W.to(..)` and its kin. `x.to(W)` asks for a dtype and a device alone."""
    args = tuple(arg.base if isinstance(arg, Terms) else arg for arg in args)
    if not isinstance(W, Terms):
        return function(W, *args, **options)
    base = function(W.base, *args, **options)
    if not base.is_floating_point():
        return NotImplemented
    new = {"base": base, "left": W.left.to(base.device), "right": W.right.to(base.device)}
    return W.viewed(lambda t: function(t, *args, **options), **new)
