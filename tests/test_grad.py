"""`value_and_grad`: equal to torch.func, and with a graph only where one is asked for."""

from __future__ import annotations

import pytest
import torch
from models import adapted, largest, text_batch

import lora_func as lf


def setup():
    model, adapter, params = adapted()
    batch = text_batch()
    return (lambda p: adapter(model, p, batch).loss), params


def test_equals_torch_func():
    f, params = setup()
    value, grads = lf.value_and_grad(f)(params)
    expected, expected_value = torch.func.grad_and_value(f)(params)
    assert value == expected_value
    assert largest(grads, expected) <= 1e-7
    assert not value.requires_grad
    assert not any(grad.requires_grad for grad in grads.values())
    assert not any(leaf.requires_grad for leaf in params.values())


def test_aux_arguments_and_structures():
    def f(params, scale, *, shift):
        loss = scale * (params["a"][0] ** 2).sum() + shift
        return loss, {"loss": loss, "note": "kept"}

    params = {"a": [torch.arange(3.0)], "unused": torch.ones(2)}
    (value, aux), grads = lf.value_and_grad(f, has_aux=True)(params, 2.0, shift=1.0)
    assert value == aux["loss"] == 11.0
    assert aux["note"] == "kept"
    assert not aux["loss"].requires_grad
    assert torch.equal(grads["a"][0], 4 * torch.arange(3.0))
    assert torch.equal(grads["unused"], torch.zeros(2))
    assert lf.value_and_grad(lambda x: x**2)(torch.tensor(3.0)) == (9.0, 6.0)


def test_differentiable_inside_a_transform():
    cube = lf.value_and_grad(lambda x: x**3)
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert torch.func.grad(lambda x: cube(x)[1])(two) == 12.0
    assert torch.func.jvp(lambda x: cube(x)[1], (two,), (one,))[1] == 12.0
    _, slopes = torch.func.vmap(cube)(torch.stack([one, two]))
    assert torch.equal(slopes, torch.tensor([3.0, 12.0]))


def test_leaves_that_require_grad_take_the_cheap_way():
    """As in a loop with an optimizer. The graph of the graph is there for the asking."""
    x = torch.tensor(2.0, requires_grad=True)
    value, grad = lf.value_and_grad(lambda x: x**3)(x)
    assert (value, grad) == (8.0, 12.0)
    assert not value.requires_grad
    assert not grad.requires_grad
    assert x.grad is None
    lf.value_and_grad(lambda x: x**3, create_graph=True)(x)[1].backward()
    assert x.grad == 12.0


def test_compiled():
    f, params = setup()
    torch._dynamo.reset()
    compiled = torch.compile(lf.value_and_grad(f), fullgraph=True, backend="aot_eager")
    assert largest(compiled(params)[1], lf.value_and_grad(f)(params)[1]) <= 1e-6


@pytest.mark.parametrize(
    ("f", "given"),
    [
        (lambda x: x, r"of shape \(3,\)"),
        (lambda x: x.sum().item(), "a float"),
        (lambda x: (x.sum(), x), "a tuple"),
    ],
)
def test_the_loss_must_be_a_scalar(f, given):
    message = rf"the loss must be a tensor of shape \(\), and it is {given}"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.value_and_grad(f)(torch.ones(3))


def test_gradients_are_contiguous():
    """So is `.grad`. torch.distributed with gloo silently averages slices of a tensor wrongly."""
    model, adapter, params = adapted(lf.PiSSA(r=4))
    batch = text_batch()
    _, grads = lf.value_and_grad(lambda p: adapter(model, p, batch).loss)(params)
    assert all(grad.is_contiguous() for grad in grads.values())
