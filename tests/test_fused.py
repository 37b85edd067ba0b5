"""The fused form of a variant: the same function and derivatives, where the engine may take it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import trained
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_func as lf
from lora_func.calculator import Live
from lora_func.fused import low_rank_linear
from lora_func.variants import _gate
from lora_func.variants._gate import gated_over

ALL = lf.Targets(roles=())


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


@pytest.fixture(params=["alone", "packed"])
def hooks(request):
    """What is kept for backward is packed by hooks, as by those of a checkpoint, or is not."""
    if request.param == "alone":
        return contextlib.nullcontext
    return lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: [t], lambda held: held[0])


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize(
    ("lead", "own"),
    [((2, 3), ""), ((7,), ""), ((), ""), ((2, 3), "AB"), ((2, 3), "A"), ((2, 3), "B")],
)
def test_its_derivatives_are_those_of_finite_differences(lead, own, scale, hooks):
    """First and second ones, one at a time and many, and the value is that of the plain formula."""
    torch.manual_seed(0)
    W, b = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    A, B = leaf(*("A" in own) * (2,), 3, 5), leaf(*("B" in own) * (2,), 4, 3)
    point = (leaf(*lead, 5), A, B)

    def f(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        with hooks():
            return low_rank_linear(x, W, b, A, B, scale)

    x, A, B = point
    torch.testing.assert_close(f(*point), F.linear(x, W, b) + scale * (x @ A.mT) @ B.mT)
    assert torch.autograd.gradcheck(f, point, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, point)


def test_inputs_of_any_layout():
    """Transposed, expanded and empty inputs, and gradients that are views."""
    W, A, B = torch.randn(4, 5), torch.randn(2, 5), torch.randn(4, 2)
    full = W + B @ A
    for given in (torch.randn(5, 3).mT, torch.randn(3, 2, 5).transpose(0, 1), torch.randn(0, 5)):
        x = given.requires_grad_()
        out = low_rank_linear(x, W, None, A, B)
        torch.testing.assert_close(out, F.linear(x, full))
        grad = torch.randn(()).expand(out.shape)
        (gx,) = torch.autograd.grad(out, x, grad)
        torch.testing.assert_close(gx, grad @ full)


def test_a_frozen_A_needs_no_input():
    """Nothing of the size of the input is kept, and the derivatives are there."""
    W, A, B = torch.randn(4, 500), torch.randn(2, 500), leaf(4, 2, dtype=torch.float32)
    x, kept = leaf(50, 500, dtype=torch.float32), []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = low_rank_linear(x, W, None, A, B)
    assert all(t.numel() < x.numel() for t in kept)
    gx, gB = torch.autograd.grad(out.sum(), (x, B))
    torch.testing.assert_close(gx, torch.ones(50, 4) @ (W + B @ A))
    torch.testing.assert_close(gB, torch.ones(50, 4).mT @ (x @ A.mT))


@pytest.mark.parametrize("frozen", ["B", "AB"])
def test_frozen_factors(frozen, hooks):
    """What is left has its derivatives of both orders, and only what they need is kept."""
    torch.manual_seed(0)
    W, A, B, x = torch.randn(4, 5).double(), leaf(3, 5), leaf(4, 3), leaf(7, 5)
    A, B = (t.detach() if name in frozen else t for name, t in (("A", A), ("B", B)))
    point = [t for t in (x, A, B) if t.requires_grad]
    kept = []

    def f(*point: Tensor) -> Tensor:
        with hooks():
            return low_rank_linear(point[0], W, None, point[1] if len(point) > 1 else A, B)

    assert torch.autograd.gradcheck(f, point)
    assert torch.autograd.gradgradcheck(f, point)

    def pack(t: Tensor) -> Tensor:
        kept.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        f(*point)
    if hooks is contextlib.nullcontext:  # the innermost hooks are those that see it
        assert (x.shape in kept) == ("A" not in frozen)
        assert (7, 3) not in kept


class Spied(lf.LoRA):
    """A LoRA that notes when its fused form runs."""

    calls: list[Any] = []  # noqa: RUF012  (cleared by each test)

    def fused(self, x, W, b, params):
        self.calls.append(x)
        return super().fused(x, W, b, params)


def runs_fused(call: Any) -> bool:
    Spied.calls.clear()
    call()
    return bool(Spied.calls)


def setting(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(inplace=True), nn.Linear(12, 8, bias=False))
    model = model.to(dtype)
    adapter, params = lf.adapt(model, Spied(r=4), targets=ALL, **options)
    params = {key: t.requires_grad_() for key, t in trained(params).items()}
    return model, adapter, params, torch.randn(3, 5, 8, dtype=dtype)


def test_where_it_runs():
    model, adapter, params, x = setting()
    assert runs_fused(lambda: adapter(model, params, x))
    assert runs_fused(lambda: lf.bind(adapter, model, params)(x))
    assert runs_fused(lambda: adapter(model, lf.expand(params, 3), x))
    with torch.no_grad():
        assert runs_fused(lambda: adapter(model, params, x))
    low = setting(torch.bfloat16)
    assert runs_fused(lambda: low[1](*low[:1], *low[2:]))


@contextlib.contextmanager
def hooked(register: Any):
    handle = register(lambda *_: None)
    yield
    handle.remove()


def test_where_it_does_not_run():
    """Under transforms, hooks, autocast, dropout and `active`, and for layers of other kinds."""
    model, adapter, params, x = setting()
    plain = adapter(model, params, x)
    contexts = [
        torch.autocast("cpu", torch.bfloat16),
        hooked(model[0].register_forward_hook),
        hooked(model[2].register_forward_pre_hook),
        hooked(model[0].register_full_backward_hook),
        hooked(nn.modules.module.register_module_forward_hook),
    ]
    for context in contexts:
        with context:
            Spied.calls.clear()
            out = adapter(model, params, x)
            assert len(Spied.calls) < 2
            torch.testing.assert_close(out.float(), plain, rtol=0.05, atol=0.05)
    active = torch.ones(3, 5, dtype=torch.bool)
    assert not runs_fused(lambda: adapter(model, params, x, active=active))
    assert not runs_fused(
        lambda: torch.func.grad(lambda p: adapter(model, p, x).sum())(dict(params))
    )
    with_dropout = setting(dropout=0.5)
    assert not runs_fused(lambda: with_dropout[1](with_dropout[0].train(), params, x))
    assert runs_fused(lambda: with_dropout[1](with_dropout[0].eval(), params, x))

    class Named(nn.Linear):
        pass

    other = nn.Sequential(Named(8, 8))
    adapter, params = lf.adapt(other, Spied(r=4), targets=ALL)
    assert not runs_fused(lambda: adapter(other, params, x))
    assert torch.equal(adapter(other, params, x), other(x))


def test_a_forward_that_a_library_put_on_every_linear_layer(monkeypatch):
    """It runs, and is not skipped in silence."""
    model, adapter, params, x = setting()
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * plain(self, x))
    assert not runs_fused(lambda: adapter(model, params, x))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_tensor_that_is_no_parameter(name):
    """A layer whose weight or bias another network computes: its gradient flows, as without."""
    model = nn.Sequential(nn.Linear(8, 12))
    made = getattr(model[0], name).detach().clone().requires_grad_()
    delattr(model[0], name)
    setattr(model[0], name, made)
    adapter, params = lf.adapt(model, Spied(r=4), targets=ALL)
    x = torch.randn(3, 8)
    out = adapter(model, params, x)
    torch.testing.assert_close(out, model(x))
    (grad,) = torch.autograd.grad(out.sum(), made)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("variant", [lf.LoRAXS(r=4), lf.TinyLoRA(r=4), lf.LoRA(r=4)], ids=repr)
def test_rounding_makes_no_constant_require_grad(variant):
    """Else a frozen A would cost its input in memory."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)).to(torch.bfloat16)
    adapter, params = lf.adapt(model, variant, targets=ALL)
    params = {key: t.requires_grad_() for key, t in params.items()}
    view = adapter.view(model, params, call=True)
    for layer in view.layers:
        prepared = layer.entries(torch.bfloat16).params
        assert {t.dtype for t in prepared.values()} == {torch.bfloat16}
        assert prepared["B"].requires_grad
        assert prepared["A"].requires_grad == ("A" in layer.leaves())


@pytest.mark.parametrize("variant", [lf.LoRA(r=4), lf.DoRA(r=4), lf.PiSSA(r=4)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("large", [_gate.LARGE, 0])
def test_a_step_equals_that_of_the_plain_form(variant, dtype, large, monkeypatch):
    """Through a model, its checkpoints, and an in-place activation behind the layer."""
    monkeypatch.setattr(_gate, "LARGE", large)
    model, _, _, x = setting(dtype)
    kind: Any = type(variant)
    plain: Any = type(kind.__name__, (kind,), {"fused": lf.Variant.fused})(**vars(variant))
    found = []
    for form in (variant, plain):
        adapter, params = lf.adapt(
            model, form, targets=ALL, generator=torch.Generator().manual_seed(0)
        )
        noise = torch.Generator().manual_seed(1)
        leaves = {
            key: (t + 0.1 * torch.randn(t.shape, generator=noise)).requires_grad_()
            for key, t in params.items()
        }

        def loss(adapter=adapter, leaves=leaves) -> Tensor:
            return adapter(model, leaves, x).float().square().mean()

        grads = torch.autograd.grad(loss(), list(leaves.values()))
        bound = lf.bind(adapter, model, leaves)
        again = checkpoint(bound, x, use_reentrant=False).float().square().mean()
        # Under a checkpoint a gate keeps its input, and else divides its output: rounded twice.
        close: Any = {"rtol": 0.03, "atol": 1e-3} if dtype == torch.bfloat16 and not large else {}
        for grad, other in zip(grads, torch.autograd.grad(again, list(leaves.values()))):
            torch.testing.assert_close(grad, other, **close)
        found.append((loss().detach(), *grads))
    error = 1e-5 if dtype == torch.float32 else 0.03  # one rounding fewer
    for ours, theirs in zip(*found):
        largest = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=error, atol=error * largest)


def test_second_derivatives_through_a_model():
    """create_graph works through the model, as for a gradient penalty."""
    model, adapter, params, x = setting(torch.float64)
    leaves = list(params.values())
    grads = torch.autograd.grad(adapter(model, params, x).square().sum(), leaves, create_graph=True)
    penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
    found = torch.autograd.grad(penalty, leaves)

    def norm(p: dict[str, Tensor]) -> Tensor:
        grads = torch.func.grad(lambda p: adapter(model, p, x).square().sum())(p)
        return torch.stack([grad.square().sum() for grad in grads.values()]).sum()

    expected = torch.func.grad(norm)({key: t.detach() for key, t in params.items()})
    for grad, key in zip(found, params):
        torch.testing.assert_close(grad, expected[key], rtol=1e-6, atol=1e-6)


# a gate that is written over the output of its layer


@pytest.fixture
def none_is_small(monkeypatch):
    monkeypatch.setattr(_gate, "LARGE", 0)


def gate_setting(lead: tuple[int, ...] = (7,), own: bool = False) -> tuple[Any, ...]:
    torch.manual_seed(0)
    W, d = torch.randn(4, 5, dtype=torch.float64), leaf(*own * (lead[0], 1), 4)
    d.data[..., 1] = -1  # its output is zero, and its gradient is not
    return W, (leaf(*lead, 5), leaf(3, 5), leaf(4, 3), d)


@pytest.mark.parametrize("behind", ["nothing", "an in-place activation"])
@pytest.mark.parametrize(("lead", "own"), [((7,), False), ((2, 3), False), ((2, 3), True)])
def test_derivatives_of_a_gate_over_its_input(lead, own, behind, none_is_small):
    """Of both orders, also if the output is overwritten, from which backward had its input."""
    W, point = gate_setting(lead, own)

    def f(x: Tensor, A: Tensor, B: Tensor, d: Tensor) -> Tensor:
        u = low_rank_linear(x, W, None, A, B)
        y = gated_over(u, d)
        assert y is u
        return y if behind == "nothing" else y.tanh_()

    x, A, B, d = point
    expected = (1 + d) * (x @ (W + B @ A).mT)
    torch.testing.assert_close(f(*point), expected if behind == "nothing" else expected.tanh())
    assert torch.autograd.gradcheck(f, point, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, point)


def test_a_gate_keeps_only_its_output(none_is_small):
    """The output is there anyway, where what comes behind keeps it."""
    W, (x, A, B, d) = gate_setting()
    with Live() as live:
        y = gated_over(low_rank_linear(x, W, None, A, B), d)
    assert live.now == y.nbytes + 8 * x.shape[0] * A.shape[0]  # and x Aᵀ


def test_a_gate_under_hooks_keeps_its_input(none_is_small):
    """What a checkpoint keeps is not watched, so an activation in place would change it unseen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LeakyReLU(0.3, inplace=True))
    adapter, params = lf.adapt(model, lf.DoRA(r=2), targets=ALL)
    leaves = {key: t.requires_grad_() for key, t in trained(params).items()}
    bound, x = lf.bind(adapter, model, leaves), torch.randn(5, 8).requires_grad_()
    plain, again = (
        torch.autograd.grad(run().square().sum(), [x, *leaves.values()])
        for run in (lambda: bound(x), lambda: checkpoint(bound, x, use_reentrant=False))
    )
    for grad, other in zip(plain, again):
        torch.testing.assert_close(grad, other)


class Products(TorchDispatchMode):
    """Counts products of matrices that have `n` columns or rows."""

    def __init__(self, n: int):
        super().__init__()
        self.n, self.found = n, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        out = func(*args, **(kwargs or {}))
        if "mm" in func.__name__ and self.n in out.shape:
            self.found += 1
        return out


def test_a_checkpoint_makes_no_product_that_it_does_not_need():
    """Of the last layer of a block, to go back the base needs none, and so the adapter."""
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 13, bias=False))
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=ALL)
    leaves = {key: t.requires_grad_() for key, t in trained(params).items()}
    bound, x = lf.bind(adapter, model, leaves), torch.randn(5, 8).requires_grad_()
    out = checkpoint(bound, x, use_reentrant=False)
    with Products(13) as products:
        torch.autograd.grad(out.sum(), list(leaves.values()))
    assert products.found == 1  # the gradient of B, [13, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gate_of_small_numbers(dtype, none_is_small):
    """In float16 a small factor would lose what it scales, so its input is kept."""
    x, A = 1e-3 * torch.randn(7, 5, dtype=dtype), torch.randn(3, 5, dtype=dtype).requires_grad_()
    W, B = torch.randn(4, 5, dtype=dtype), torch.zeros(4, 3, dtype=dtype)
    d = torch.full((4,), -0.998, dtype=dtype).requires_grad_()
    (grad,) = torch.autograd.grad(gated_over(low_rank_linear(x, W, None, A, B), d).sum(), d)
    torch.testing.assert_close(grad, F.linear(x, W).sum(0), rtol=0.02, atol=1e-5)


def test_a_gate_where_its_input_cannot_be_made_again(none_is_small):
    """With a frozen A nothing of the size of x is kept, so the input of the gate is."""
    W, (x, A, B, d) = gate_setting()
    for frozen in ((A,), (A, B), (x, A, B)):
        p = {id(t): t.detach() if any(t is f for f in frozen) else t for t in (x, A, B)}
        y = gated_over(low_rank_linear(p[id(x)], W, None, p[id(A)], p[id(B)]), d)
        (grad,) = torch.autograd.grad(y.sum(), d)
        torch.testing.assert_close(grad, (x @ (W + B @ A).mT).sum(0))
