"""A parameter with a low-rank change, as one tensor whose sum is not formed.

What is linear in a weight splits: `x (P + B A)ᵀ = x Pᵀ + (x Aᵀ) Bᵀ`. A `LowRank` stands for the
sum in the place of a parameter. It answers products by the base's own product and two small ones,
and views such as `W[e]` and `W.mT` by a `LowRank` again. For anything else it forms the sum. So a
module with a forward of its own, such as fused experts, runs as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import LoraFuncError
from ..libraries import transformers
from . import products
from .parameter import Layout
from .terms import Terms, convert, index, index_select, transpose, transpose_matrix, unbind


class LowRank(Tensor):
    """Stands for `P + as_stored(B A)`, with the shape, dtype and device of P.

    Products cast the factors to the dtype of their other operand, so that the gradients of rows
    add up in the factors' own. Those of a stack, which are large, and those that get no gradient
    are cast to the dtype of P at once. With an axis of examples in front of the factors, the first
    axis of the other operand is that of the examples: row i takes the factors of example i.
    `terms` are the terms of the sum.

    Raises LoraFuncError where the parameter is written to, where gradients are switched off that
    the factors are to get, and where an example axis is not seen. It has no storage: code that
    reads its memory fails. `torch.compile` does not trace it.
    """

    terms: Terms

    def __new__(  # noqa: PLR0917
        cls,
        P: Tensor,
        A: Tensor,
        B: Tensor,
        layout: Layout,
        dense: Callable[[], Tensor],
        n: int | None = None,
        path: str = "",
        repeats: Mapping[Any, int] | None = None,
    ) -> LowRank:
        """`A [.., r, d_in]` and `B [.., d_out, r]` as a variant sees them; `P` as it is stored.

        `dense()` makes the sum; it is called at most once. `n`: A and B have an axis of n examples
        in front. `repeats`: each of its values k allows k rows for each example, one after the
        other, as beams stand.
        """
        trains = torch.is_grad_enabled() and (A.requires_grad or B.requires_grad)
        if layout.is_stack or not trains:
            A, B = A.to(P.dtype), B.to(P.dtype)
        left, right = (A.mT, B.mT) if layout.transposed else (B, A)
        if layout.kernel:
            right = right.unflatten(-1, layout.stored[1:])
        return cls.of(
            Terms(
                base=P,
                left=left,
                right=right,
                form=dense,
                path=path,
                kernel=layout.kernel,
                n=n,
                repeats={} if repeats is None else repeats,
                trains=trains,
            )
        )

    @classmethod
    def of(cls, terms: Terms) -> LowRank:
        """The tensor with given terms."""
        P = terms.base
        self = cls._make_wrapper_subclass(
            cls, terms.shape, strides=P.stride(), dtype=P.dtype, device=P.device
        )
        self.terms = terms
        return self

    def __repr__(self) -> str:  # pyright: ignore  (Tensor's takes an argument)
        return f"LowRank({self.terms.path!r}, {tuple(self.shape)}, rank={self.terms.rank})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        kwargs = kwargs or {}
        answer = ANSWERS.get(func)
        if answer is None and transformers.multiplies_groups(func):
            answer = products.grouped
        if answer is not None:  # none takes a sum inside of a list
            given = {name: as_terms(value) for name, value in kwargs.items()}
            result = answer(func, *map(as_terms, args), **given)
            if result is not NotImplemented:
                several = type(result) is tuple
                return tuple(map(as_tensor, result)) if several else as_tensor(result)
        args, kwargs = pytree.tree_map(as_terms, (args, kwargs))
        check_write(func, args, kwargs)
        args, kwargs = pytree.tree_map_only(Terms, Terms.dense, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Autograd is over at this point: the factors would get no gradient.
        path = next(W.terms.path for W in pytree.tree_leaves((args, kwargs)) if isinstance(W, cls))
        raise LoraFuncError(
            f"{path!r}: its module passes the parameter to compiled code ({func}), where an "
            "adapter cannot act. Leave it out of the targets"
        )


def as_terms(value: Any) -> Any:
    """The terms of a `LowRank`; any other value as it is."""
    return value.terms if isinstance(value, LowRank) else value


def as_tensor(value: Any) -> Any:
    """The inverse of `as_terms`."""
    return LowRank.of(value) if isinstance(value, Terms) else value


WRITES = re.compile(r"(?!__).*_|__i(add|sub|mul|truediv|div|pow|and|or|xor)__|__set(item)?__")


def check_write(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises LoraFuncError if a function would write to the sum, which later products ignore."""
    name = getattr(func, "__name__", "")
    for W in (kwargs.get("out"), *(args[:1] if WRITES.fullmatch(name) else ())):
        if isinstance(W, Terms):
            raise LoraFuncError(
                f"{W.path!r}: its module writes to the parameter in its forward ({name}). An "
                "adapted one takes no write: leave it out of the targets"
            )


def by(answer: Callable[..., Any], *functions: Any) -> dict[Any, Callable[..., Any]]:
    """Each of the functions -> what answers it."""
    return dict.fromkeys(functions, answer)


def getter(name: str) -> Any:
    """The function that reads an attribute of a tensor."""
    return getattr(Tensor, name).__get__


ANSWERS: dict[Any, Callable[..., Any]] = {
    **by(products.linear, F.linear),
    **by(products.product, torch.matmul, Tensor.matmul, Tensor.__matmul__),
    **by(products.product, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm),
    **by(products.product_plus, torch.addmm, torch.baddbmm),
    **by(products.embedding, F.embedding),
    **by(products.convolution, F.conv1d, F.conv2d, F.conv3d),
    **by(products.transposed_convolution, F.conv_transpose1d, F.conv_transpose2d),
    **by(products.transposed_convolution, F.conv_transpose3d),
    **by(index, Tensor.__getitem__),
    **by(index_select, torch.index_select, Tensor.index_select),
    **by(unbind, torch.unbind, Tensor.unbind),
    **by(transpose, torch.transpose, Tensor.transpose, getter("mT")),
    **by(transpose_matrix, torch.t, Tensor.t, getter("T")),
    **by(convert, Tensor.to, Tensor.type_as, Tensor.contiguous, Tensor.clone),
    **by(convert, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double),
}
"""How a function is answered. One that is not listed gets the sum."""

PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad")
PROPERTIES += ("grad_fn", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested")
METADATA = {getter(name) for name in PROPERTIES} | {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.element_size),
    *(Tensor.__len__, Tensor.__hash__, Tensor.get_device, Tensor.is_inference, torch.numel),
    *(torch.is_floating_point, torch.is_complex),
}
"""What it answers as any tensor does."""
