"""Products with `base + left @ right`: the base's own product, and two small ones.

Each takes a function of torch and its arguments, of which one is `Terms`, and returns the result,
or NotImplemented: then the function is for the sum. Nothing of the size of `base` is made, or kept
for backward but `base` itself. The arithmetic of the grouped products is that of unsloth's split
LoRA and of PEFT's pull request 3577.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .terms import Terms, are_terms


def linear(function: Any, input: Tensor, weight: Any, bias: Any = None) -> Any:
    """`F.linear`: x Wᵀ = x baseᵀ + (x rightᵀ) leftᵀ."""
    if not are_terms(weight, input, bias) or len(weight.shape) != 2:
        return NotImplemented
    out = function(input, weight.base, bias)
    return weight.plus(out, input, lambda x, left, right: F.linear(F.linear(x, right), left))


def product(function: Any, *pair: Any, **options: Any) -> Any:
    """`x @ W` and `W @ x`, under any of their names."""
    if len(pair) != 2 or options:
        return NotImplemented
    x, W = pair
    if are_terms(W, x):
        out = times_base(function, x, W)
        change = lambda x, left, right: x @ left @ right  # noqa: E731
        return out if out is NotImplemented else W.plus(out, x, change)
    W, x = pair
    if are_terms(W, x) and W.neighbours == 1:
        out = function(W.base, x)
        return W.plus(out, x, lambda x, left, right: left @ (right @ x), axes=3)
    return NotImplemented


def times_base(function: Any, x: Tensor, W: Terms) -> Any:
    """`x @ base`. Neighbours are one matrix of it, so their rows are one matrix of x."""
    n, P = W.neighbours, W.base
    if n == 1:
        return function(x, P)
    if x.dim() != 3 or x.shape[0] != W.shape[0]:
        return NotImplemented
    rows = x.unflatten(0, (P.shape[0], n)).flatten(1, 2)  # [E, n rows, d_in]
    return function(rows, P).unflatten(1, (n, x.shape[1])).flatten(0, 1)


def product_plus(
    function: Any, input: Tensor, x: Tensor, W: Any, *, beta: float = 1, alpha: float = 1
) -> Any:
    """`torch.addmm` and `torch.baddbmm`: beta input + alpha x @ W."""
    if not are_terms(W, input, x) or W.neighbours > 1:
        return NotImplemented
    out = function(input, x, W.base, beta=beta, alpha=alpha)
    return W.plus(out, x, lambda x, left, right: (alpha * (x @ left)) @ right)


# Torch's kernel on a GPU takes this many groups of rows in one call.
MOST_GROUPS = 1023
# There, a group with factors of this many columns costs little more than one with a few. On an
# H200, 16 neighbours of rank 16 took 9.9 ms as one group of 256, 10.9 ms as four of 64.
WIDE = 256


def grouped(function: Any, x: Tensor, W: Any, offs: Any = None, **options: Any) -> Any:
    """`x[offs[e - 1] : offs[e]] @ W[e]`, for all e in one kernel."""
    stack = are_terms(W, x) and len(W.shape) == 3 and W.n is None
    if not stack or offs is None or x.dim() != 2:
        return NotImplemented
    n, r = W.neighbours, W.rank
    out = function(x, W.base, offs=last_of_each(n, offs), **options)
    m = 1 if n == 1 else together(W.shape[0], n, WIDE // max(r, 1) if x.is_cuda else 1)
    ends = last_of_each(m, offs)
    pad = -m * r % (16 // x.element_size())  # the kernel takes rows of a multiple of 16 bytes

    def change(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        if m > 1:  # the factors of m neighbours side by side, [E / m, d_in, m r]
            left = left.unflatten(0, (-1, m)).movedim(1, -2).flatten(-2)
            right = right.unflatten(0, (-1, m)).flatten(1, 2)
        if pad:
            left, right = F.pad(left, (0, pad)), F.pad(right, (0, 0, 0, pad))
        inner = function(x, left, offs=ends)
        if m > 1:
            inner = inner * own_block(x.shape[0], offs, m, r, pad)
        return function(inner, right, offs=ends)

    return W.plus(out, x, change)


def last_of_each(m: int, offs: Tensor) -> Tensor:
    """The ends of groups that join m neighbours each."""
    return offs if m == 1 else offs[m - 1 :: m].contiguous()


def together(groups: int, neighbours: int, cheap: int) -> int:
    """How many neighbours are to be one group: as many as are `cheap`, or as the kernel needs."""
    divisors = [m for m in range(1, neighbours + 1) if neighbours % m == 0]
    least = max(m for m in divisors if m <= max(cheap, 1))
    return next((m for m in divisors if m >= least and groups // m <= MOST_GROUPS), neighbours)


def own_block(rows: int, offs: Tensor, m: int, r: int, pad: int) -> Tensor:
    """Whether a column of `[rows, m r + pad]` is of the neighbour that the row belongs to."""
    row = torch.arange(rows, device=offs.device, dtype=offs.dtype)
    neighbour = torch.searchsorted(offs, row, right=True) % m
    column = torch.arange(m * r + pad, device=offs.device) // r
    return neighbour.unsqueeze(-1) == column


def embedding(  # noqa: PLR0917  (the arguments of torch)
    function: Any,
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """`F.embedding`: rows of base + rows of left @ right."""
    del norm_type, sparse  # they are about max_norm, and about the gradient of a dense weight
    rescaled = max_norm is not None or scale_grad_by_freq
    if rescaled or not are_terms(weight, input) or len(weight.shape) != 2:
        return NotImplemented
    out = function(input, weight.base, padding_idx)

    def change(ids: Tensor, left: Tensor, right: Tensor) -> Tensor:
        rows = F.embedding(ids, left).to(out.dtype) @ right.to(out.dtype)
        if padding_idx is None:
            return rows
        padding = (ids == padding_idx % weight.shape[0]).unsqueeze(-1)
        return torch.where(padding, rows.detach(), rows)  # F.embedding gives it no gradient

    return weight.plus(out, input, change)  # ids of one axis may be positions


def convolution(  # noqa: PLR0917  (the arguments of torch)
    function: Any,
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """`F.conv1d` and its kin: the convolution with `right`, then a pointwise one with `left`."""
    if not are_terms(weight, input, bias, kernel=True) or is_wide(weight, groups):
        return NotImplemented
    options = (stride, padding, dilation, groups)

    def change(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return pointwise(function(x, in_groups(right, groups), None, *options), left, right, groups)

    out = function(input, weight.base, bias, *options)
    return weight.plus(out, input, change, axes=len(weight.shape))


def transposed_convolution(  # noqa: PLR0917  (the arguments of torch)
    function: Any,
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """`F.conv_transpose1d` and its kin: a pointwise convolution with `left`, then `right`'s."""
    if not are_terms(weight, input, bias, kernel=True) or is_wide(weight, groups):
        return NotImplemented
    options = (stride, padding, output_padding, groups, dilation)

    def change(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        mix = left.unflatten(0, (groups, -1)).mT.flatten(0, 1)  # [groups r, in / groups]
        return function(pointwise(x, mix, right, groups), in_groups(right, groups), None, *options)

    out = function(input, weight.base, bias, *options)
    return weight.plus(out, input, change, axes=len(weight.shape))


def is_wide(W: Terms, groups: int) -> bool:
    """Whether r channels for each group are more than the layer has: then the sum costs less."""
    return W.n is None and groups > 1 and groups * W.rank > W.shape[0]


def in_groups(kernels: Tensor, groups: int) -> Tensor:
    """Kernels `[r, in, k, ..]`, once for each group."""
    return kernels if groups == 1 else kernels.repeat(groups, *[1] * (kernels.dim() - 1))


def pointwise(x: Tensor, mix: Tensor, kernels: Tensor, groups: int) -> Tensor:
    """The channels of x mixed by `mix [out, in / groups]`, at each place of the kernels' grid."""
    axes = kernels.dim() - 2
    flat = F.conv1d(x.flatten(-axes), mix.unsqueeze(-1), groups=groups)
    return flat.unflatten(-1, x.shape[-axes:])
