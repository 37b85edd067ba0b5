"""Each Triton kernel computes what PyTorch does.

On a GPU, or in Triton's interpreter: `nox -s kernels`.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

import lora_func as lf
from lora_func import kernels
from lora_func.variants import _gate

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
runs = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (CUDA or INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
on_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
UNIT = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # a rounding


def drawn(*size, dtype=torch.float32):
    return torch.randn(size).to(DEVICE, dtype)


def check(given, exact, dtype, what=""):
    """To a rounding of its largest entry."""
    off = (given.double() - exact).abs().max().item() / exact.abs().max().item()
    assert off <= UNIT[dtype], f"{what}: {off:.3g}"


@runs
@dtypes
@pytest.mark.parametrize(
    ("size", "own"),
    [
        *((size, False) for size in [(1, 16), (5, 3), (2, 37, 300), (700, 129), (1, 1)]),
        *((size, True) for size in [(1, 16), (5, 3), (2, 37, 300), (3, 33, 20)]),
    ],
)
def test_gate(dtype, size, own):
    """Of all rows, and of examples with gates of their own."""
    from lora_func.kernels import programs  # noqa: PLC0415  (which imports Triton)

    torch.manual_seed(0)
    y, grad = drawn(*size, dtype=dtype), drawn(*size, dtype=dtype)
    d = drawn(*(size[0], 1) * own, size[-1], dtype=dtype)
    if own:
        y, grad = (t.view(size[0], -1, size[-1]) for t in (y, grad))
    wide = y.double(), grad.double(), d.double()
    check(programs.gate(y, d), wide[0] * (1 + wide[2]), dtype)
    dy, dd = programs.gate_backward(grad, y, d)
    assert (dy.dtype, dd.dtype) == (dtype, torch.float32)
    check(dy, wide[1] * (1 + wide[2]), dtype)
    assert dd.shape == d.shape
    check(dd, (wide[0] * wide[1]).sum_to_size(d.shape), dtype)


@runs
@pytest.mark.parametrize("zero", [0.0, 2.0**-60])
def test_a_gate_in_place_whose_factor_is_zero(zero):
    from lora_func.kernels import programs  # noqa: PLC0415

    y, d = drawn(5, 16), drawn(16)
    d[3] = -1
    factor = torch.where(d == -1, zero, 1 + d)
    expected = y * factor
    dy, _ = programs.gate_backward(y, y, d, zero)
    assert torch.equal(dy, expected)
    assert programs.gate(y, d, out=y, zero=zero) is y
    assert torch.equal(y, expected)


@runs
@dtypes
@pytest.mark.parametrize("each", [(), ("A",), ("B",), ("A", "B")])
@pytest.mark.parametrize("shape", [(1, 64, 48, 8), (4, 100, 130, 3), (8, 2050, 7, 64)])
def test_add_low_rank(dtype, shape, each):
    """With factors of their own, each serves the same number of rows."""
    m, i, o, r = shape
    from lora_func.kernels import programs  # noqa: PLC0415

    torch.manual_seed(0)
    n = max(m // 2, 1)
    y, x = drawn(m, o, dtype=dtype), drawn(m, i, dtype=dtype)
    A = drawn(*([n] if "A" in each else []), r, i, dtype=dtype)
    B = drawn(*([n] if "B" in each else []), o, r, dtype=dtype)
    rows = [k * n // m for k in range(m)]
    A_of = A[rows] if "A" in each else A.expand(m, r, i)
    B_of = B[rows] if "B" in each else B.expand(m, o, r)
    h = torch.einsum("mi,mri->mr", x.double(), A_of.double())
    exact = y.double() + 0.7 * torch.einsum("mr,mor->mo", h, B_of.double())
    programs.add_low_rank(y, x, A, B, 0.7)
    check(y, exact, dtype)


@on_gpu
def test_which_tensors():
    """Plain ones of one dtype, in one piece; not in a transform."""
    t = torch.ones(4, 4, device="cuda")
    assert kernels.takes(t, t[0])
    assert not kernels.takes(t.mT[:, :2])
    assert not kernels.takes(t, t.bfloat16())
    assert not kernels.takes(t.double())
    assert not kernels.takes(t.cpu())
    assert not torch.vmap(lambda row: row if kernels.takes(row) else row * 0)(t).any()


@on_gpu
@pytest.mark.parametrize("variant", [lf.IA3(), lf.DoRA(r=4)])
@pytest.mark.parametrize("own", [False, True])
def test_a_large_gate_has_its_derivatives(variant, own, monkeypatch):
    """First ones by the kernel, second ones without; also with a gate for each example."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False)).cuda()
    adapter, params = lf.adapt(model, variant, targets=lf.Targets(roles=(), names=("0",)))
    params = lf.expand(params, 4) if own else params
    leaves = {k: (t + 0.1 * torch.randn_like(t)).requires_grad_() for k, t in params.items()}
    x = torch.randn(4, 10, 64, device="cuda", requires_grad=True)

    def found():
        out = adapter(model, leaves, x)
        first = torch.autograd.grad(out.square().sum(), [x, *leaves.values()], create_graph=True)
        total = torch.stack([g.square().sum() for g in first]).sum()
        second = torch.autograd.grad(total, list(leaves.values()))
        plain = torch.autograd.grad(adapter(model, leaves, x).square().sum(), [x, *leaves.values()])
        return out, *first, *second, *plain

    expected = found()
    monkeypatch.setattr(_gate, "LARGE", 0)
    for given, other in zip(found(), expected, strict=True):
        torch.testing.assert_close(given, other, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device_than_the_current_one():
    from lora_func.kernels import programs  # noqa: PLC0415

    y, d = (torch.ones(size, device="cuda:1") for size in ((4, 16), (16,)))
    assert torch.cuda.current_device() == 0
    assert torch.equal(programs.gate(y, d), y + y * d)
    dy, dd = programs.gate_backward(y, y, d)
    assert torch.equal(dy, y + y * d)
    assert torch.equal(dd, y.sum(0))
    programs.add_low_rank(y, y.clone(), torch.ones_like(y[:2]), torch.ones(16, 2).to(y), 1.0)
    assert torch.equal(y, torch.full_like(y, 33))


@on_gpu
@pytest.mark.parametrize("adapters", [1, 4])
def test_a_bound_view_of_a_few_rows(adapters):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96)).cuda()
    adapter, params = lf.adapt(model, lf.LoRA(r=4), targets=lf.Targets(roles=(), names=("0",)))
    members = [{k: t + torch.randn_like(t) for k, t in params.items()} for _ in range(adapters)]
    view = lf.bind(adapter, model, lf.stack(members) if adapters > 1 else members[0]).eval()
    x = torch.randn(4, 3, 64, device="cuda")
    with torch.no_grad():
        few, many = view(x), torch.cat([view(x.repeat(1, 3, 1))[:, :3]])
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-4)
