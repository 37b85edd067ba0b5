"""Kernels in Triton, where PyTorch has none that is fast.

Each does what a line or two of PyTorch do beside where it is called, and `tests/test_kernels.py`
compares the two. `takes` says which tensors may come here.

A gate: PyTorch reads a vector along the rows of a matrix at a third of the bandwidth, and its
backward passes over the matrix six times, where three are enough. A few rows: the two products of a
low-rank update take longer to start than to run, so one kernel does both.
"""

# A kernel is launched as `kernel[grid](..)`.
# pyright: reportIndexIssue=false
from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs


def gate(y: Tensor, d: Tensor, out: Tensor | None = None, zero: float = 0.0) -> Tensor:
    """`y + y ∘ d`, for `y [.., n]` and `d [n]`, or `y [k, rows, n]` and `d [k, 1, n]`.

    Rounded once. `out`: where to write it, which may be y. `zero`: in the place of a factor 1 + d
    of zero.
    """
    out, n = torch.empty_like(y) if out is None else out, d.shape[-1]
    groups = d.numel() // n
    rows = y.numel() // n // groups  # of each group
    parts = triton.cdiv(rows, 16)
    with on_device_of(y):
        gate_kernel[groups * parts, triton.cdiv(n, 256)](
            y, d, out, zero, rows, n, parts, BLOCK_R=16, BLOCK_N=256
        )
    return out


def gate_backward(grad: Tensor, y: Tensor, d: Tensor, zero: float = 0.0) -> tuple[Tensor, Tensor]:
    """Of `gate`: `grad + grad ∘ d`, and `grad ∘ y`, summed to the shape of d in float32."""
    dy, n = torch.empty_like(grad), d.shape[-1]
    groups = d.numel() // n
    rows = y.numel() // n // groups
    parts = triton.cdiv(rows, 32)
    sums = torch.empty(groups, parts, n, dtype=torch.float32, device=y.device)
    with on_device_of(y):
        gate_backward_kernel[groups * parts, triton.cdiv(n, 512)](
            grad, y, d, dy, sums, zero, rows, n, parts, STEPS=4, BLOCK_R=8, BLOCK_N=512
        )
    return dy, sums.sum(1).view(d.shape)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """`y += scale (x Aᵀ) Bᵀ` in place, for a few rows: `y [m, o]`, `x [m, i]`.

    `A [r, i]`, `B [o, r]`, or with an axis n in front: then each serves m / n rows, one after the
    other.
    """
    (m, o), i, r = y.shape, x.shape[1], A.shape[-2]
    each_A = m // A.shape[0] if A.dim() == 3 else m
    each_B = m // B.shape[0] if B.dim() == 3 else m
    sizes, (R, width) = (o, r, each_A, each_B, i), blocks(i, r)
    values = y, x, A, B, float(scale), *sizes, R, width, BLOCK_O
    grid = (o + BLOCK_O - 1) // BLOCK_O, m, 1
    with on_device_of(y):
        aligned = not (y.data_ptr() | x.data_ptr() | A.data_ptr() | B.data_ptr()) % 16
        if aligned and not knobs.runtime.interpret:
            compiled(y.device, y.dtype, *sizes)[grid](*values)
        else:
            add_low_rank_kernel[grid](*values, num_warps=WARPS)


BLOCK_O, WARPS = 128, 8


@functools.cache
def blocks(i: int, r: int) -> tuple[int, int]:
    """How many rows and columns of A the kernel reads at once."""
    R = max(triton.next_power_of_2(r), 16)
    return R, min(triton.next_power_of_2(i), max(16384 // R, 16))


@functools.cache
def compiled(device: torch.device, dtype: torch.dtype, *sizes: int) -> Any:
    """`add_low_rank_kernel` for these sizes, and tensors that start at multiples of 16 bytes.

    To find it by the arguments of each launch, as Triton does, takes as long as the launch.
    """
    t = torch.empty(16, dtype=dtype, device=device)
    _, r, _, _, i = sizes
    values = t, t, t, t, 0.5, *sizes, *blocks(i, r), BLOCK_O
    kernel: Any = add_low_rank_kernel
    return kernel.warmup(*values, num_warps=WARPS, grid=(1,))


def on_device_of(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the GPU of `t` the current one, which Triton takes, whatever that of a tensor."""
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device_of(t)


@triton.jit
def gate_kernel(  # noqa: PLR0917  # pyright: ignore
    y, d, out, zero, rows, n, parts, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A tile of `gate`, in one group of rows."""
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    row = part * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (group * rows + row)[:, None].to(tl.int64) * n + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < n)
    factor = 1 + tl.load(d + group * n + column, mask=column < n, other=0).to(tl.float32)
    factor = tl.where(factor == 0, zero, factor)
    u = tl.load(y + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, (u * factor[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward_kernel(  # noqa: PLR0917  # pyright: ignore
    grad, y, d, dy, sums, zero, rows, n, parts,
    STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some rows of `gate_backward` of one group, in a strip of columns."""
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = 1 + tl.load(d + group * n + column, mask=column < n, other=0).to(tl.float32)
    factor = tl.where(factor == 0, zero, factor)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for step in range(STEPS):
        row = (part * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        at = (group * rows + row)[:, None].to(tl.int64) * n + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < n)
        g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
        u = tl.load(y + at, mask=inside, other=0).to(tl.float32)
        tl.store(dy + at, (g * factor[None, :]).to(dy.dtype.element_ty), mask=inside)
        total += tl.sum(g * u, 0)
    tl.store(sums + tl.program_id(0) * n + column, total, mask=column < n)


@triton.jit
def add_low_rank_kernel(  # noqa: PLR0917  # pyright: ignore
    y, x, A, B, scale, o, r, each_A, each_B, i: tl.constexpr,
    R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A block of outputs of `add_low_rank`, for one row."""
    row = tl.program_id(1)
    rank = tl.arange(0, R)
    out = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    A += (row // each_A).to(tl.int64) * r * i
    B += (row // each_B).to(tl.int64) * o * r
    partial = tl.zeros((R, BLOCK_I), tl.float32)
    for start in range(0, i, BLOCK_I):
        column = start + tl.arange(0, BLOCK_I)
        v = tl.load(x + row.to(tl.int64) * i + column, mask=column < i, other=0).to(tl.float32)
        there = (rank[:, None] < r) & (column[None, :] < i)
        a = tl.load(A + rank[:, None] * i + column[None, :], mask=there, other=0).to(tl.float32)
        partial += a * v[None, :]
    h = tl.sum(partial, 1)
    there = (out[:, None] < o) & (rank[None, :] < r)
    b = tl.load(B + out[:, None] * r + rank[None, :], mask=there, other=0).to(tl.float32)
    at = y + row.to(tl.int64) * o + out
    u = tl.load(at, mask=out < o, other=0).to(tl.float32) + scale * tl.sum(b * h[None, :], 1)
    tl.store(at, u.to(y.dtype.element_ty), mask=out < o)
