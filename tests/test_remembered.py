"""What a layer of a bound view remembers from one input to the next, and what makes it forget."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_func as lf
from lora_func.errors import LoraFuncError

VARIANTS = [lf.LoRA(r=2), lf.DoRA(r=2), lf.PiSSA(r=2)]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.outer = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def bound(variant: lf.Variant, n: int = 1) -> tuple[lf.Adapter, nn.Module, dict[str, Tensor], Any]:
    """Adapter, model, trained params (with an example axis for n > 1), and a view that has run."""
    torch.manual_seed(0)
    model = Model()
    adapter, params = lf.adapt(model, variant)
    sets = [{k: t + 0.3 * torch.randn_like(t) for k, t in params.items()} for _ in range(n)]
    params = sets[0] if n == 1 else lf.stack(sets)
    view = lf.bind(adapter, model, params).eval()
    return adapter, model, params, view


def told(adapter: lf.Adapter, model: nn.Module, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """What a call says, which remembers nothing."""
    return adapter(model, params, x)


def layer_of(view: nn.Module, name: str = "inner") -> Any:
    return view.get_submodule(name)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name())
@pytest.mark.parametrize("grad", [False, True])
def test_it_remembers(variant, grad):
    adapter, model, params, view = bound(variant)
    x = torch.randn(2, 3, 6)
    with torch.set_grad_enabled(grad):
        view(x)
        assert layer_of(view)._whole is not None
        torch.testing.assert_close(view(x), told(adapter, model, params, x))


def change_leaf(view: nn.Module, params: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for leaf in params.values():
            leaf.mul_(1.5)


def take_step(view: nn.Module, params: dict[str, Tensor]) -> None:
    leaves = [*params.values()]
    optimizer = torch.optim.SGD(leaves, lr=0.5)
    view(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def change_mode(view: nn.Module, params: dict[str, Tensor]) -> None:
    view.train()
    view.eval()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name())
@pytest.mark.parametrize("grads", [(False, False), (True, True), (False, True), (True, False)])
@pytest.mark.parametrize("change", [change_leaf, take_step, change_mode])
def test_changed_leaves_are_seen(variant, grads, change: Callable[..., None]):
    adapter, model, params, view = bound(variant)
    x = torch.randn(2, 3, 6)
    for grad in (*grads, *grads):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(view(x), told(adapter, model, params, x))
            torch.testing.assert_close(view(x), told(adapter, model, params, x))
        with torch.enable_grad():
            change(view, params)


@pytest.mark.parametrize("grad", [False, True])
def test_a_hook_on_the_base_layer_runs(grad):
    _, _, _, view = bound(lf.LoRA(r=2))
    x, layer = torch.randn(3, 6), layer_of(view)._modules["layer"]
    with torch.set_grad_enabled(grad):
        before = view(x), view(x)
        handle = layer.register_forward_hook(lambda module, args, out: out + 1)
        assert not torch.allclose(view(x), before[1])
        handle.remove()
        assert torch.equal(view(x), before[1])


@pytest.mark.parametrize("grad", [False, True])
def test_a_hook_on_all_modules_runs(grad):
    _, _, _, view = bound(lf.LoRA(r=2))
    x, seen = torch.randn(3, 6), []
    with torch.set_grad_enabled(grad):
        view(x)
        hook = torch.nn.modules.module.register_module_forward_hook
        handle = hook(lambda module, args, out: seen.append(type(module)))
        try:
            view(x)
        finally:
            handle.remove()
    assert seen.count(nn.Linear) == 2


def test_a_base_weight_that_is_to_be_trained_has_a_gradient():
    _, _, _, view = bound(lf.LoRA(r=2))
    view(torch.randn(3, 6))
    weight = layer_of(view)._modules["layer"].weight
    weight.requires_grad_()
    view(torch.randn(3, 6)).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("grad", [False, True])
def test_another_base_weight_is_read(grad):
    _, _, _, view = bound(lf.LoRA(r=2))
    x, layer = torch.randn(3, 6), layer_of(view)._modules["layer"]
    with torch.set_grad_enabled(grad):
        before = view(x)
        layer.weight = nn.Parameter(2 * layer.weight.detach(), requires_grad=False)
        with pytest.warns(UserWarning, match="is not the one on which"):
            after = view(x)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("grad", [False, True])
def test_another_dtype(grad):
    adapter, model, params, view = bound(lf.LoRA(r=2))
    x = torch.randn(3, 6)
    with torch.set_grad_enabled(grad):
        view(x)
        out = view.double()(x.double())
        want = told(adapter, copy.deepcopy(model).double(), params, x.double())
        assert out.dtype == torch.float64
        torch.testing.assert_close(out, want)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad):
    adapter, model, params, view = bound(lf.LoRA(r=2))
    x = torch.randn(3, 6)
    with torch.set_grad_enabled(grad):
        view(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = view(x)
            want = told(adapter, model, params, x)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, want)
        assert view(x).dtype == torch.float32


def test_a_transform():
    adapter, model, params, view = bound(lf.LoRA(r=2))
    x = torch.randn(3, 6)
    view(x)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(view, params, (x,)).square().sum()

    found = torch.func.grad(loss)({k: t.detach() for k, t in params.items()})
    want = torch.func.grad(lambda p: told(adapter, model, p, x).square().sum())(dict(params))
    for key in params:
        torch.testing.assert_close(found[key], want[key])


@pytest.mark.parametrize("grad", [False, True])
def test_other_parameters_for_a_forward(grad):
    """Some with an example axis, in a view that was bound without."""
    adapter, model, params, view = bound(lf.LoRA(r=2))
    x = torch.randn(3, 2, 6)
    population = {k: torch.stack([t, 2 * t, 3 * t]).detach() for k, t in params.items()}
    with torch.set_grad_enabled(grad):
        for given in (params, population, params, population):
            out = torch.func.functional_call(view, dict(given), (x,))
            torch.testing.assert_close(out, told(adapter, model, given, x))


def test_dropout_of_a_layer_that_ran_without():
    torch.manual_seed(0)
    model = Model()
    adapter, params = lf.adapt(model, lf.LoRA(r=2), dropout=0.9)
    params = {key: t + torch.randn_like(t) for key, t in params.items()}
    view = lf.bind(adapter, model, params).eval()
    x = torch.randn(64, 6)
    still = view(x)
    view.train()
    assert not torch.allclose(view(x), still)


@pytest.mark.parametrize("grad", [False, True])
def test_each_input_is_checked(grad):
    adapter, model, params, view = bound(lf.LoRA(r=2), n=3)
    x = torch.randn(3, 2, 6)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            torch.testing.assert_close(view(x), told(adapter, model, params, x))
        with pytest.raises(LoraFuncError, match="first axis is not that of the 3 examples"):
            view(torch.randn(2, 2, 6))


@pytest.mark.parametrize("make", [copy.deepcopy, lambda view: view], ids=["copy", "itself"])
def test_a_copy_has_functions_of_its_own(make):
    adapter, model, params, view = bound(lf.LoRA(r=2))
    x = torch.randn(3, 6)
    with torch.no_grad():
        out = view(x)
        other = make(view)
        for leaf in other.parameters():
            if leaf.requires_grad:
                leaf.mul_(2)
        assert not torch.allclose(other(x), out)
        torch.testing.assert_close(view(x), told(adapter, model, params, x))


def test_gradients_switched_on_inside_of_a_forward():
    _, _, _, view = bound(lf.LoRA(r=2))
    x = torch.randn(3, 6)
    with torch.no_grad():
        view(x)
    layer, kept = layer_of(view), []
    inner_forward = layer.forward

    def forward(x: Tensor) -> Tensor:
        with torch.enable_grad():
            kept.append(inner_forward(x))
        return kept[-1].detach()

    layer.forward = forward
    with torch.no_grad():
        view(x)
        view(x)
    del layer.forward
    torch.testing.assert_close(kept[-1].detach(), layer_of(view)(x).detach())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name())
def test_threads_that_train_one_view(variant):
    """Each has the gradients of its own forward."""
    _, _, params, view = bound(variant)
    x = torch.randn(3, 6)
    leaves = [*params.values()]
    want = torch.autograd.grad(view(x).square().sum(), leaves)
    found: list[Any] = []

    def train() -> None:
        for _ in range(20):
            found.append(torch.autograd.grad(view(x).square().sum(), leaves))

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    for grads in found:
        torch.testing.assert_close(grads, want)
