"""torch.func and autograd: a cheap vmap, and whether a transform or a backward runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore  (compiled)
    TransformType,
    _add_batch_dim,
    _remove_batch_dim,
    _unwrap_batched,
    _unwrap_for_grad,
    _vmap_decrement_nesting,
    _vmap_increment_nesting,
    _wrap_for_grad,
    current_level,
    is_batchedtensor,
    maybe_get_level,
    peek_interpreter_stack,
    unwrap_if_dead,
)
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.pyfunctorch import coerce_cinterpreter, temporarily_pop_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch._functorch.vmap import (
    lazy_load_decompositions,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from ..errors import LoraFuncError

RELIES_ON = {
    "torch._C._functorch": (
        "current_level",
        "is_batchedtensor",
        "maybe_get_level",
        "peek_interpreter_stack",
        "unwrap_if_dead",
        "TransformType.Vmap",
        "_add_batch_dim",
        "_remove_batch_dim",
        "_unwrap_batched",
        "_unwrap_for_grad",
        "_wrap_for_grad",
        "_vmap_decrement_nesting",
        "_vmap_increment_nesting",
    ),
    "torch._functorch.autograd_function": ("custom_function_call",),
    "torch._functorch.pyfunctorch": (
        "coerce_cinterpreter",
        "temporarily_pop_interpreter_stack",
        "FuncTorchInterpreter.level",
        "FuncTorchInterpreter.lower",
    ),
    "torch._functorch.utils": ("enable_single_level_autograd_function",),
    "torch._functorch.vmap": ("lazy_load_decompositions",),
    "torch.autograd.forward_ad": ("_current_level", "_set_fwd_grad_enabled"),
    "torch.autograd.function": ("_SingleLevelFunction",),
    "torch._C": ("_current_graph_task_id",),
    "torch._C._autograd": ("_top_saved_tensors_default_hooks",),
    "torch": ("_foreach_copy_", "ops.aten._unsafe_view"),
}

Result = TypeVar("Result", Tensor, tuple[Tensor, ...])


def over_first_axis(function: Callable[..., Result], *tensors: Tensor) -> Result:
    """`torch.vmap(function)(*tensors)`, for a function of tensors to a tensor or a tuple of them.

    `torch.vmap` takes arguments of any structure, and handling the structure takes it longer than
    a variant takes for its kernels: 59 us around LoRA's factors, against 10 us here.
    """
    if torch.compiler.is_compiling():
        return torch.vmap(function)(*tensors)
    lazy_load_decompositions()
    n = tensors[0].shape[0]
    level = _vmap_increment_nesting(n, "error")
    try:
        out = function(*(_add_batch_dim(t, 0, level) for t in tensors))
        if isinstance(out, tuple):
            return tuple(_remove_batch_dim(t, level, n, 0) for t in out)
        return _remove_batch_dim(out, level, n, 0)
    finally:
        _vmap_decrement_nesting()


def is_batched_here(t: Tensor) -> bool:
    """Whether `t` is batched by the innermost `over_first_axis` that is running."""
    return is_batchedtensor(t) and maybe_get_level(t) == current_level()


def batched(t: Tensor) -> Tensor:
    """`t [n, ..]` as the innermost `over_first_axis` sees it: `[..]`, for each of n."""
    return _add_batch_dim(t, 0, current_level())


def on_all(function: Callable[[Tensor], Tensor], t: Tensor, n: int) -> Tensor:
    """Within `over_first_axis`: a function of all n values of `t` at once, `[n, ..] -> [n, ..]`.

    It runs as if there were no vmap.
    """
    level = current_level()
    whole = _remove_batch_dim(t, level, n, 0) if is_batched_here(t) else t.expand(n, *t.shape)
    with temporarily_pop_interpreter_stack():
        out = function(whole)
    return _add_batch_dim(out, 0, level)


Linear = Callable[[Tensor], Tensor]


def through_transform(function: Linear, adjoint: Linear, x: Tensor) -> Tensor:
    """`function(x)` for a function that is linear in x, in a transform of torch.func.

    `adjoint` is its transpose. Both run outside of the innermost transform, and call this function
    again if they are in another. So neither needs to be made of what torch can differentiate, and
    whatever they make on the way is not kept for backward. A `torch.autograd.Function` does the
    same for any function, and adds 0.3 ms to a call; this adds 0.05 ms (torch 2.13, on a CPU).
    """
    interpreter = coerce_cinterpreter(peek_interpreter_stack())
    if interpreter.key() == TransformType.Functionalize:
        raise LoraFuncError("torch.func.functionalize cannot pass a packed layer")
    x, level = unwrap_if_dead(x), interpreter.level()
    if maybe_get_level(x) != level:  # a constant of the transform
        with interpreter.lower():
            return function(x)
    if interpreter.key() == TransformType.Vmap:
        inner, axis = _unwrap_batched(x, level)
        with interpreter.lower():
            out = function(inner.movedim(axis, 0))  # pyright: ignore  (batched: it has an axis)
        return _add_batch_dim(out, 0, level)
    with enable_single_level_autograd_function():
        return OneLevel.apply(x, interpreter, function, adjoint)  # pyright: ignore


class OneLevel(_SingleLevelFunction):
    """A linear function for one torch.func.grad, vjp or jvp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, interpreter: Any, function: Linear, adjoint: Linear):
        ctx.function, ctx.adjoint = function, adjoint
        level = interpreter.level()
        inner = _unwrap_for_grad(x, level)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), interpreter.lower():
            out = function(inner)
        return _wrap_for_grad(out, level)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore
        return ctx.adjoint(grad), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None):  # pyright: ignore
        return ctx.function(tangent)


def in_transform() -> bool:
    """Whether a torch.func transform runs in this thread, or forward-mode autograd in any."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def in_functorch() -> bool:
    """Whether a torch.func transform runs in this thread."""
    return peek_interpreter_stack() is not None


def is_batched(t: Tensor) -> bool:
    """Whether `t` is batched by a torch.vmap that is running."""
    return is_batchedtensor(t)


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, with all arguments of its `forward`.

    In torch's own, to look up the signature of a `forward` beside a `setup_context` takes longer
    than its kernels: 40 us in each call.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)
    if peek_interpreter_stack() is not None:
        return custom_function_call(function, *args)  # pyright: ignore  (untyped)
    plain: Any = super(torch.autograd.Function, function)
    return plain.apply(*args)


def in_backward() -> bool:
    """Whether a backward pass of autograd runs in this thread."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore  (compiled)


def packs_saved() -> bool:
    """Whether hooks pack what is kept for backward, as those of a checkpoint do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore


def own_tensor(t: Tensor) -> Tensor:
    """`t`, with its memory, as a tensor that autograd does not know as a view.

    An output of a `torch.autograd.Function` that is a view cannot be changed in place, and a
    product of three axes is one.
    """
    return torch.ops.aten._unsafe_view(t, t.shape) if t._is_view() else t


def copy_together(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies each source to its target, by one kernel on a GPU."""
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
