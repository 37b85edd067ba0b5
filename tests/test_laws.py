"""The laws that every adapter obeys, over the whole catalogue: shapes, ranks, dtypes, seeds and empty batches are drawn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, data_for, layers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_func as lf
from lora_func.variant import Weight

# relative to the largest entry of the reference, which is computed in float64: what the dtype resolves, times what a
# product over at most 96 inputs accumulates
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
DTYPES = list(TOLERANCE)
small = st.integers(2, 6)

over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
over_trained = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if case.trains])
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def assert_close(given: Tensor, reference: Tensor, tolerance: float, scale: Tensor | None = None) -> None:
    """Within `tolerance` of the largest entry of `reference` (and of `scale`, where the reference may cancel)."""
    assert given.shape == reference.shape
    if given.numel():
        size = max(t.abs().max().item() for t in (reference, reference if scale is None else scale))
        assert (given.double() - reference.double()).abs().max().item() <= tolerance * max(size, 1e-30)


def test_catalogue_is_covered():
    variants = {type(case.make() if case.ranks(2, 2) is None else case.make(r=2)) for case in CASES.values()}
    assert variants == set(lf.VARIANTS.values())
    assert all(name == variant.name() for name, variant in lf.VARIANTS.items())


@over_cases
@given(data=st.data())
def test_purity(case: Case, data):
    """Two calls return the same bits, write to nothing, and send gradients to the trainable leaves alone."""
    layer = data.draw(layers(case))
    leaves = {name: layer.trained[name].requires_grad_() for name in layer.names}
    constants = [layer.weight.matrix, *[t for t in (layer.weight.bias,) if t is not None]]
    constants += [t.requires_grad_() for t in constants] and [
        leaf for name, leaf in layer.trained.items() if name not in leaves
    ]
    everything = [layer.x, *constants, *leaves.values()]
    before = [(t._version, t.detach().clone()) for t in everything]
    first, second = layer(layer.trained), layer(layer.trained)
    assert torch.equal(first, second)
    assert all(t._version == version and torch.equal(t, value) for t, (version, value) in zip(everything, before))
    assert not any(leaf.requires_grad for name, leaf in layer.trained.items() if name not in leaves)


@over_cases
@over_dtypes
@given(data=st.data())
def test_identity_at_init(case: Case, dtype, data):
    """The output at init is the base output: to the bit, or within the error that the case declares."""
    layer = data.draw(layers(case, dtype))
    out, base_out = layer(layer.init), layer.base(layer.x)
    error = case.identity(layer.variant, dtype)
    if error == 0:
        assert torch.equal(out, base_out)
    else:  # the error is relative to x, which W then maps: by at most its norm
        scale = layer.x.norm() * layer.weight.matrix.double().norm() + base_out.double().norm()
        assert_close(out, base_out, error, scale)


@over_cases
@over_dtypes
@given(data=st.data())
def test_equals_the_merged_layer(case: Case, dtype, data):
    """out = x W_effᵀ + b_eff, with W_eff from the closed form in float64."""
    layer = data.draw(layers(case, dtype))
    wide = {name: leaf.double() for name, leaf in layer.trained.items()}
    bias = layer.weight.bias
    W, b = layer.variant.merged(Weight(layer.weight.matrix.double(), None if bias is None else bias.double()), wide)
    reference = F.linear(layer.x.double(), W, b)
    # a sum of products resolves no better than its largest term: |x| |W| for the base, |x| |W_eff| with the adapter
    scale = (layer.x.double().abs() @ (W.abs() + layer.weight.matrix.double().abs()).mT).max() if layer.x.numel() else reference
    assert_close(layer(layer.trained), reference, TOLERANCE[dtype] * case.condition(layer), torch.as_tensor(scale))


@over_cases
@given(data=st.data())
def test_affine_in_x(case: Case, data):
    """f(a u + c v) - f(0) = a (f(u) - f(0)) + c (f(v) - f(0)), and f(0) is the merged bias."""
    layer = data.draw(layers(case, leads=((3,),)))
    u, v, zero = layer.x, layer.x.flip(0), torch.zeros_like(layer.x)
    f = lambda x: layer(layer.trained, x)  # noqa: E731
    b = layer.variant.merged(layer.weight, layer.trained)[1]
    assert_close(f(zero), torch.zeros_like(f(zero)) if b is None else b.expand_as(f(zero)), 1e-10, f(u))
    assert_close(f(0.7 * u - 1.3 * v) - f(zero), 0.7 * (f(u) - f(zero)) - 1.3 * (f(v) - f(zero)), 1e-10, f(u))


@over_cases
@given(data=st.data())
def test_rows_are_independent(case: Case, data):
    """Reshaping, permuting and splitting the tokens commutes with the adapter."""
    layer = data.draw(layers(case, leads=((6,),)))
    f = lambda x: layer(layer.trained, x)  # noqa: E731
    whole, x = f(layer.x), layer.x
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert_close(f(x.reshape(2, 3, -1)).reshape(6, -1), whole, 1e-12)
    assert_close(f(x[order]), whole[order], 1e-12)
    assert_close(torch.stack([f(row) for row in x]), whole, 1e-12)
    assert f(x[:0]).shape == (0, whole.shape[-1])


@over_cases
@over_dtypes
@given(data=st.data())
def test_shape_and_dtype(case: Case, dtype, data):
    """Those of the base output, whatever the dtype in which the parameters are kept."""
    layer = data.draw(layers(case, dtype))
    kept_in = data.draw(st.sampled_from(DTYPES))
    params = {name: leaf.to(kept_in) if name in layer.names else leaf for name, leaf in layer.trained.items()}
    out, base_out = layer(params), layer.base(layer.x)
    assert (out.shape, out.dtype) == (base_out.shape, base_out.dtype)


@over_trained
@given(data=st.data())
def test_vmap_is_the_loop(case: Case, data):
    """Over stacked parameters, and over the rows of x."""
    layer = data.draw(layers(case, leads=((), (4,), (2, 3))))
    copies = {name: torch.stack([layer.trained[name] * (1 + 0.1 * k) for k in range(3)]) for name in layer.names}
    stacked = torch.vmap(layer.at)(copies)
    one_by_one = torch.stack([layer.at({name: leaf[k] for name, leaf in copies.items()}) for k in range(3)])
    assert_close(stacked, one_by_one, 1e-12)
    if layer.x.dim() > 1:
        assert_close(torch.vmap(lambda row: layer(layer.trained, row))(layer.x), layer(layer.trained), 1e-12)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if case.derivative])
@given(data=st.data())
def test_gradients(case: Case, data):
    """Against finite differences in float64, in every trainable leaf and in x, forward mode and second order included."""
    layer = data.draw(layers(case, sizes=small, leads=((2,),)))
    inputs = [layer.trained[name].requires_grad_() for name in layer.names]

    def f(x, *leaves):
        return layer({**layer.trained, **dict(zip(layer.names, leaves))}, x)

    point = (layer.x.requires_grad_(), *inputs)
    assert torch.autograd.gradcheck(f, point, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, point, atol=1e-4)  # differences of differences lose half the digits twice


@over_trained
@given(data=st.data())
def test_alive_at_init(case: Case, data):
    """Some leaf has a gradient at init, for a generic loss."""
    layer = data.draw(layers(case, sizes=st.integers(2, 24), leads=((8,),)))
    target = torch.randn(layer.base(layer.x).shape, dtype=torch.float64)
    grads = torch.func.grad(lambda leaves: (layer({**layer.init, **leaves}) * target).sum())(
        {name: layer.init[name] for name in layer.names}
    )
    assert all(grad.isfinite().all() for grad in grads.values())
    assert any(grad.abs().max() > 1e-8 for grad in grads.values())


@over_trained
@given(data=st.data())
def test_every_leaf_matters(case: Case, data):
    """Moving any one trainable leaf from its trained value moves the output."""
    layer = data.draw(layers(case, sizes=st.integers(2, 24), leads=((8,),)))
    out = layer(layer.trained)
    for name in layer.names:
        leaf = layer.trained[name]
        moved = layer.at({name: leaf + 0.1 * torch.randn_like(leaf)})
        assert (moved - out).abs().max() > 1e-9 * out.abs().max()


@over_cases
@given(data=st.data())
def test_count(case: Case, data):
    """As many trainable parameters as the paper's formula says."""
    layer = data.draw(layers(case))
    expected = case.count(getattr(layer.variant, "r", 0), *layer.weight.shape)
    assert sum(layer.trained[name].numel() for name in layer.names) == expected


@over_cases
@given(data=st.data())
def test_reads_of_the_weight(case: Case, data):
    """A variant reads of the weight what it declares: nothing, the dense matrix at init only, or rows through it."""
    layer = data.draw(layers(case))

    class Guarded(Weight):
        allowed = False

        @property
        def matrix(self):
            assert self.allowed, "the dense weight was read"
            return self._matrix

        @matrix.setter
        def matrix(self, value):
            self._matrix = value

        shape = property(lambda self: tuple(self._matrix.shape))
        calls = 0

        def __call__(self, z):
            self.calls += z.shape[-2]
            return F.linear(z, self._matrix)

    weight = Guarded(layer.weight.matrix, layer.weight.bias)
    weight.allowed = case.reads != "nothing"
    layer.variant.init(weight, torch.Generator(), layer.stats)
    weight.allowed = False
    layer(layer.trained, weight=weight)
    assert weight.calls == (layer.variant.r if case.reads == "rows" else 0)


@over_cases
@given(data=st.data())
def test_draws_from_the_generator_alone(case: Case, data):
    """The same generator state gives the same parameters, and torch's own generator is left as it was."""
    layer = data.draw(layers(case))
    state = torch.get_rng_state()
    first, second = (layer.variant.init(layer.weight, torch.Generator().manual_seed(7), layer.stats) for _ in range(2))
    assert all(torch.equal(first.trainable[name], second.trainable[name]) for name in layer.names)
    assert torch.equal(torch.get_rng_state(), state)
    wide = layer.weight.dense().dtype
    leaves = [leaf for leaf in {**first.trainable, **first.frozen}.values() if leaf.is_floating_point()]
    assert all(leaf.dtype in (torch.float32, wide) for leaf in leaves)


@over_cases
@given(data=st.data())
def test_autocast(case: Case, data):
    """Under bfloat16 autocast the output has the dtype of the base output, and the accuracy of bfloat16."""
    layer = data.draw(layers(case, torch.float32, leads=((), (5,), (2, 3))))
    wide = {name: leaf.double() for name, leaf in layer.trained.items()}
    bias = layer.weight.bias
    W, b = layer.variant.merged(Weight(layer.weight.matrix.double(), None if bias is None else bias.double()), wide)
    with torch.autocast("cpu", torch.bfloat16):
        out, base_out = layer(layer.trained), layer.base(layer.x)
    assert (out.shape, out.dtype) == (base_out.shape, base_out.dtype)
    scale = (layer.x.double().abs() @ (W.abs() + layer.weight.matrix.double().abs()).mT).max()
    assert_close(out, F.linear(layer.x.double(), W, b), TOLERANCE[torch.bfloat16] * case.condition(layer), scale)


@over_cases
def test_file_round_trip(case: Case, tmp_path):
    """Saved and loaded, an adapter has the same bits: parameters, constants and output."""
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
    rank = case.ranks(6, 6)
    variant, targets = case.make(**({} if rank is None else {"r": 2})), lf.Targets(roles=())
    adapter, params = lf.adapt(model, variant, targets=targets, **(data_for(variant, model, targets) if case.data else {}))
    params = {key: leaf + case.noise(torch.randn_like(leaf)) for key, leaf in params.items()}
    lf.save(tmp_path / "adapter.safetensors", adapter, params)
    again, loaded = lf.load(tmp_path / "adapter.safetensors", model, check_base="error")
    assert dict(again.variants) == dict(adapter.variants)
    assert loaded.keys() == params.keys()
    assert again.frozen.keys() == adapter.frozen.keys()
    assert all(torch.equal(loaded[key], params[key]) for key in params)
    assert all(torch.equal(again.frozen[key], adapter.frozen[key]) for key in adapter.frozen)
    x = torch.randn(5, 6)
    assert torch.equal(again(model, loaded, x), adapter(model, params, x))
