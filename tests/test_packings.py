"""Layers that unpack their matrix by a method of their own, and how often a matrix is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import catalogue, data_for
from models import largest, trained
from torch import Tensor, nn, no_grad
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap

import lora_func as lf
from lora_func.variant import Weight
from lora_func.weights.product import frozen_product

ALL = lf.Targets(roles=())
READS: list[nn.Module] = []  # the layers whose matrix was unpacked, in turn


@pytest.fixture(autouse=True)
def reads():
    READS.clear()
    return READS


class Packed(nn.Module):
    """int8 rows and one scale. Linear by its sizes; it has no `weight`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        matrix = linear.weight.detach()
        self.scale = matrix.abs().amax() / 127
        self.rows = nn.Parameter((matrix / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def unpack(self) -> Tensor:
        if not torch.compiler.is_compiling():
            READS.append(self)
        return self.rows * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rows * self.scale, self.bias)


class HQQLinear(Packed):
    """HQQ's method returns `[d_out, d_in]`."""

    def dequantize(self) -> Tensor:
        return self.unpack()


class TorchLinear(Packed):
    """GPTQModel's method returns `[d_in, d_out]`."""

    __module__ = "gptqmodel.nn_modules.qlinear.torch"

    def dequantize_weight(self, num_itr: int = 1) -> Tensor:
        return self.unpack().mT


class Upright(Packed):
    """The method of others returns `[d_out, d_in]` under the same name."""

    def dequantize_weight(self) -> Tensor:
        return self.unpack()


KINDS = [HQQLinear, TorchLinear, Upright]


def packed_and_plain(kind: type[Packed]) -> tuple[nn.Sequential, nn.Sequential]:
    """A model with a square layer, one without a bias, and a wide one; and the same unpacked."""
    plain = nn.Sequential(
        nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 8)
    )
    plain.requires_grad_(False)
    layers = [kind(m) if isinstance(m, nn.Linear) else m for m in plain]
    for own, layer in zip(plain, layers):
        if isinstance(own, nn.Linear) and isinstance(layer, Packed):
            own.weight.copy_(layer.rows * layer.scale)
    return nn.Sequential(*layers), plain


def adapted(variant: lf.Variant, model: nn.Module) -> tuple[lf.Adapter, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    data = data_for(variant, model, ALL)
    return lf.adapt(model, variant, targets=ALL, generator=generator, **data)


over_variants = pytest.mark.parametrize("variant", catalogue().values(), ids=catalogue().keys())


@over_variants
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_layer_is_its_unpacked_twin(kind, variant):
    """Called, differentiated in and outside of transforms, and merged."""
    (model, plain), x = packed_and_plain(kind), torch.randn(5, 8)
    (adapter, params), (twin, _) = adapted(variant, model), adapted(variant, plain)
    params = trained(params)
    torch.testing.assert_close(adapter(model, params, x), twin(plain, params, x))
    merged = lf.merge(adapter, model, params)
    assert largest(merged, lf.merge(twin, plain, params)) <= 1e-5
    expected = lf.value_and_grad(lambda p: twin(plain, p, x).square().sum())(params)[1]

    def loss(p: dict[str, Tensor]) -> Tensor:
        return adapter(model, p, x).square().sum()

    scale = max(1.0, *(grad.abs().max().item() for grad in expected.values()))
    for grads in (lf.value_and_grad(loss)(params)[1], torch.func.grad(loss)(params)):
        assert largest(grads, expected) <= 1e-5 * scale


def dual(function: Any) -> Any:
    """The derivative of a function along its own argument, by forward-mode autograd."""

    def derivative(x: Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent

    return derivative


def called_later(function: Any) -> Any:
    """The gradient of a function from a vjp whose transform is over."""

    def gradient(x: Tensor) -> Tensor:
        out, pull, *_ = vjp(function, x)
        return pull(torch.ones_like(out))[0]  # pyright: ignore

    return gradient


def twice(function: Any) -> Any:
    """The second derivative of a function along its argument, by autograd alone."""

    def derivative(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(x), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    return derivative


def left_over(function: Any) -> Any:
    """The gradient of a function, through a tensor that another gradient left over."""

    def run(x: Tensor) -> Tensor:
        left = []
        grad(lambda y: (left.append(y * x), y.sum())[1])(x)
        return function(left[0])

    return grad(run)


TRANSFORMS = {
    "nothing": lambda f: f,
    "grad": grad,
    "vjp called later": called_later,
    "grad of what a grad left over": left_over,
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "grad of grad": lambda f: grad(lambda x: grad(f)(x).square().sum()),
    "grad of jvp": lambda f: grad(lambda x: jvp(f, (x,), (x,))[1]),
    "jvp of grad": lambda f: lambda x: jvp(grad(f), (x,), (x.sin(),))[1],
    "jvp of jvp": lambda f: lambda x: jvp(lambda x: jvp(f, (x,), (x,))[1], (x,), (x.sin(),))[1],
    "forward mode": dual,
    "autograd, twice": twice,
    "vmap": vmap,
    "vmap over the last axis": lambda f: lambda x: vmap(f, in_dims=-1)(x.movedim(0, -1)),
    "vmap of vmap": lambda f: vmap(vmap(f)),
    "vmap of grad": lambda f: vmap(grad(f)),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(x).square().sum()),
    "vmap of a vjp called later": lambda f: vmap(called_later(f)),
    "vmap of jvp of grad": lambda f: vmap(lambda x: jvp(grad(f), (x,), (x.sin(),))[1]),
    "grad without gradients": lambda f: no_grad()(grad(f)),
    "gradients off in grad": lambda f: grad(lambda x: f(x) * no_grad()(f)(x)),
    "grad of a constant": lambda f: lambda x: grad(lambda y: f(x) * y.sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_packed_product_in_transforms(transform):
    """Through every transform, and through two, as the product with a plain weight."""
    (model, plain), x = packed_and_plain(HQQLinear), torch.randn(3, 2, 8)
    (adapter, params), (twin, _) = adapted(lf.LoRA(r=2), model), adapted(lf.LoRA(r=2), plain)
    params = trained(params)
    given, expected = (
        transform(lambda x, a=a, m=m: a(m, params, x).sin().sum())(x)
        for a, m in ((adapter, model), (twin, plain))
    )
    torch.testing.assert_close(given, expected)


def test_a_gradient_reads_the_matrix_anew(reads):
    """Forward keeps none for backward."""
    model, _ = packed_and_plain(HQQLinear)
    adapter, params = adapted(lf.LoRA(r=2), model)
    layers = [layer for layer in model if isinstance(layer, Packed)]
    x, n = torch.randn(5, 8), 2 * len(layers) - 1  # the first input is given no gradient

    def loss(p: dict[str, Tensor]) -> Tensor:
        return adapter(model, p, x).square().sum()

    reads.clear()
    grad(loss)(params)
    assert len(reads) == n


@pytest.mark.parametrize("needs", [True, False])
def test_a_product_has_a_gradient_if_its_input_has_one(needs):
    """The matrix is frozen, even if it says that it requires grad."""

    class Trained(Weight):
        opaque = True
        matrix = torch.ones(3, 2, requires_grad=True)

    x = torch.ones(1, 2, requires_grad=needs)
    assert frozen_product(x, Trained.__new__(Trained)).requires_grad == needs


def test_functionalize_is_refused():
    model, _ = packed_and_plain(HQQLinear)
    adapter, params = adapted(lf.LoRA(r=2), model)
    with pytest.raises(lf.LoraFuncError, match="functionalize cannot pass a packed layer"):
        torch.func.functionalize(lambda x: adapter(model, params, x))(torch.randn(5, 8))


@over_variants
@pytest.mark.parametrize("kind", KINDS)
def test_adapt_reads_each_matrix_once(kind, variant, reads):
    """For the decomposition and for the fingerprint; loading reads it once, for the latter."""
    model, _ = packed_and_plain(kind)
    data = data_for(variant, model, ALL)
    reads.clear()
    lf.adapt(model, variant, targets=ALL, **data)
    assert reads == [layer for layer in model if isinstance(layer, Packed)]


def test_load_and_merge_read_each_matrix_once(reads, tmp_path):
    model, _ = packed_and_plain(HQQLinear)
    adapter, params = adapted(lf.PiSSA(r=2), model)
    layers = [layer for layer in model if isinstance(layer, Packed)]
    for use in (
        lambda: lf.save(tmp_path / "a.safetensors", adapter, params) or layers,
        lambda: lf.load(tmp_path / "a.safetensors", model) and reads,
        lambda: lf.merge(adapter, model, params) and reads,
    ):
        reads.clear()
        assert use() == layers


def test_a_product_reads_the_matrix_once():
    """An offloaded one is copied to the device by each read, a sharded one gathered."""

    class Counted(lf.Weight):
        @property
        def matrix(self) -> Tensor:  # pyright: ignore
            reads.append(1)
            return torch.ones(3, 2)

    reads, weight = [], Counted.__new__(Counted)
    assert torch.equal(weight(torch.ones(1, 2)), torch.full((1, 3), 2.0))
    assert len(reads) == 1


# dynamo itself does what it warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_layer_compiles(kind):
    (model, _), x = packed_and_plain(kind), torch.randn(5, 8)
    adapter, params = adapted(lf.DoRA(r=2), model)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda p: adapter(model, p, x).square().sum(), fullgraph=True, backend="aot_eager"
    )
    leaves = {key: leaf.requires_grad_() for key, leaf in trained(params).items()}
    torch.testing.assert_close(compiled(leaves), adapter(model, leaves, x).square().sum())


def test_a_matrix_that_cannot_be_unpacked():
    """The kernels of a packing raise what they like. The message names the layer."""

    class NotReady(Packed):
        def dequantize(self) -> Tensor:
            raise AssertionError("model was not quantized")

    class Padded(Packed):
        def dequantize(self) -> Tensor:
            return self.unpack()[:, :-1]

    for kind, message in (
        (NotReady, r"'0': the matrix of a NotReady cannot be unpacked \(AssertionError: model was"),
        (Padded, r"'0': a Padded with a weight of torch.float32 and shape \(8, 7\), where"),
    ):
        with pytest.raises(lf.LoraFuncError, match=message):
            lf.adapt(packed_and_plain(kind)[0], lf.LoRA(r=2), targets=ALL)


def test_a_float8_weight_without_its_scales():
    """transformers' FP8Linear keeps them beside the weight: it is not the matrix of the layer."""
    layer = nn.Linear(8, 12, bias=False).requires_grad_(False)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        lf.LoraFuncError, match=r"'0' is a Linear with a weight of torch.float8_e4m3"
    ):
        lf.adapt(nn.Sequential(layer), lf.PiSSA(r=2), targets=ALL)
