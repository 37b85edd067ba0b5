"""The laws that every variant keeps, as functions of one adapted layer."""

from __future__ import annotations

import itertools
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.adapt import adapt
from ..engine.targets import Targets
from ..files.load import load
from ..files.save import save
from ..variant import Prepared, Variant, Weight
from .law import DTYPES, TOLERANCE, Broken, expect, expect_close, expect_equal, law
from .layer import Layer


def rounding_at_init(variant: Variant, dtype: torch.dtype) -> float:
    """How far the output at init may be from the base output, relative to x in `dtype`.

    0 for "exact". A variant that is exact up to "rounding" rounds in each of its r steps, and a
    chain in those of all its links.
    """
    if variant.card.at_init == "exact":
        return 0.0
    steps = sum(getattr(part, "r", 1) for part in variant.parts())
    return 8 * torch.finfo(dtype).eps * steps


def has_closed_form(variant: Variant) -> bool:
    """Whether the variant has a `merged` of its own, or each link of a chain."""
    return all(type(part).merged is not Variant.merged for part in variant.parts())


def has_factors(variant: Variant) -> bool:
    """Whether the variant has `factors` of its own, beside `merged`, or each link of a chain."""
    own = all(type(part).factors is not Variant.factors for part in variant.parts())
    return has_closed_form(variant) and own


def closed_forms(variant: Variant, weight: Weight, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `merged` and `factors` return."""
    W, b = variant.merged(weight, params)
    A, B = variant.factors(weight, params) or (None, None)
    return {name: t for name, t in (("W", W), ("b", b), ("A", A), ("B", B)) if t is not None}


@law()
def purity(layer: Layer) -> None:
    """Two calls return the same bits and write to nothing; only leaves and x get gradients."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in layer.leaves().items()}
    frozen = {name: t for name, t in layer.trained.items() if name not in leaves}
    constants = {**frozen, "W": layer.weight.matrix}
    if layer.weight.bias is not None:
        constants["b"] = layer.weight.bias
    x = layer.x.clone().requires_grad_()
    everything = {**leaves, **constants, "x": x}
    before = {name: (t._version, t.detach().clone()) for name, t in everything.items()}
    first, second = (layer({**leaves, **frozen}, x) for _ in range(2))
    expect_equal(first.detach(), second.detach(), "the second call")
    if first.requires_grad:
        first.sum().backward()
    for name, (version, value) in before.items():
        t = everything[name]
        expect(t._version == version, f"{name} was written to")
        expect_equal(t.detach(), value, f"{name} after the call")
    for name, t in constants.items():
        expect(not t.requires_grad and t.grad is None, f"the constant {name} got a gradient")


@law(dtypes=DTYPES)
def identity_at_init(layer: Layer) -> None:
    """The output at init is the base output: to the bit, or as close as `card.at_init` says."""
    out, base_out = layer(layer.init), layer.base(layer.x)
    if layer.variant.card.at_init == "exact":
        expect_equal(out, base_out, "the output at init against the base output")
        return
    error = rounding_at_init(layer.variant, out.dtype)
    if layer.variant.card.at_init == "moved":
        error = layer.moved + torch.finfo(out.dtype).eps
    # The error is relative to x, which W then maps: by at most its norm.
    scale = layer.x.norm().double() * layer.weight.matrix.double().norm() + base_out.double().norm()
    expect_close(out, base_out, error, "the output at init against the base output", scale)


@law(dtypes=DTYPES, applies=has_closed_form)
def equals_the_merged_layer(layer: Layer) -> None:
    """out = x W_effᵀ + b_eff, with W_eff from the closed form in float64."""
    expected, scale = layer.reference()
    tolerance = TOLERANCE[layer.x.dtype] * layer.condition
    expect_close(layer(layer.trained), expected, tolerance, "out against the merged layer", scale)


@law(
    dtypes=(torch.float32, torch.bfloat16),
    leads=((1,),),
    applies=lambda variant: has_closed_form(variant) and variant.card.at_init == "exact",
)
def merged_at_init_is_the_weight(layer: Layer) -> None:
    """At init W_eff, in the dtype of the weight, is the weight to the bit, and so is the bias.

    For parameters in any dtype. No term of B A differs from zero there.
    """
    matrix, bias = layer.weight.matrix, layer.weight.bias
    for kept_in in DTYPES:
        params = {**layer.init, **{name: layer.init[name].to(kept_in) for name in layer.names}}
        found, given = closed_forms(layer.variant, layer.weight, params), f"parameters in {kept_in}"
        expect_equal(found["W"].to(matrix.dtype), matrix, f"W_eff at init, {given}")
        if bias is not None:
            expect_equal(found["b"].to(bias.dtype), bias, f"the bias at init, {given}")
        if "A" in found:
            terms = (found["B"].abs() @ found["A"].abs()).max()
            expect(terms == 0, f"the terms of B A at init, {given}, add up to {terms:.3g}, not 0")


@law(dtypes=(torch.float64, torch.bfloat16), leads=((1,),), applies=has_factors)
def factors_make_the_merged_weight(layer: Layer) -> None:
    """W_eff = W + B A, with `factors` in float32 or wider, and the bias is that of the layer."""
    found, W = closed_forms(layer.variant, layer.weight, layer.trained), layer.weight.matrix
    if "A" not in found:
        return
    A, B, wide = found["A"], found["B"], torch.promote_types(W.dtype, torch.float32)
    for name, factor in (("A", A), ("B", B)):
        expect(factor.dtype.itemsize >= 4, f"{name} is in {factor.dtype}, narrower than float32")
    rank, (d_out, d_in) = len(A), W.shape
    expect(A.shape == (rank, d_in), f"A has shape {tuple(A.shape)}, not (k, {d_in})")
    expect(B.shape == (d_out, rank), f"B has shape {tuple(B.shape)}, not ({d_out}, {rank})")
    sizes = W.abs() + B.abs() @ A.abs()
    expect_close(W + B @ A, found["W"], TOLERANCE[wide], "W + B A against W_eff", sizes)
    if layer.weight.bias is not None:
        expect_equal(found["b"], layer.weight.bias, "the merged bias")


@law(leads=((1,),), applies=has_closed_form)
def merged_of_a_stack_is_the_loop(layer: Layer) -> None:
    """torch.vmap of `merged` and `factors` over stacks of weights and parameters is the loop."""
    weight = {"W": layer.weight.matrix, "b": layer.weight.bias}
    one = {name: t for name, t in weight.items() if t is not None}
    scales = torch.tensor([1.0, 1.1, 1.2], dtype=torch.float64)
    each = [{**layer.trained, **{n: t * s for n, t in layer.leaves().items()}} for s in scales]

    def forms(weight: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        return closed_forms(layer.variant, Weight(weight["W"], weight.get("b")), params)

    def stacked(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([entries[name] for entries in dicts]) for name in dicts[0]}

    loop, tolerance = stacked([forms(one, params) for params in each]), 1e-12 * layer.condition
    for name, t in torch.vmap(forms)(stacked([one] * 3), stacked(each)).items():
        expect_close(t, loop[name], tolerance, f"vmap over stacks: {name}")


@law(leads=((3,),), largest=24, applies=has_closed_form, trains=True)
def closed_forms_have_the_derivatives(layer: Layer) -> None:
    """The merged layer, and the base plus (x Aᵀ) Bᵀ, have the adapter's derivatives in each leaf.

    In reverse mode and in forward mode.
    """
    x, leaves = layer.x, layer.leaves()

    def merged(trainable: dict[str, Tensor]) -> Tensor:
        found = closed_forms(layer.variant, layer.weight, {**layer.trained, **trainable})
        return F.linear(x, found["W"], found.get("b"))

    def factored(trainable: dict[str, Tensor]) -> Tensor:
        found = closed_forms(layer.variant, layer.weight, {**layer.trained, **trainable})
        return layer.base(x) + (x @ found["A"].mT) @ found["B"].mT

    def wave(t: Tensor) -> Tensor:
        return torch.linspace(-1, 1, t.numel(), dtype=t.dtype).sin().reshape(t.shape)

    def derivatives(f: Callable[[dict[str, Tensor]], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        out, pull = torch.func.vjp(f, leaves)  # pyright: ignore  (two, without has_aux)
        steps = {name: wave(leaf) for name, leaf in leaves.items()}
        return pull(wave(out))[0], torch.func.jvp(f, (leaves,), (steps,))[1]

    grads, moved = derivatives(layer.at)
    largest = torch.cat([grad.flatten() for grad in grads.values()])
    has_both = "A" in closed_forms(layer.variant, layer.weight, layer.trained)
    for form in (merged, factored) if has_both else (merged,):
        own_grads, own_moved = derivatives(form)
        tolerance, name = 1e-10 * layer.condition, form.__name__
        for leaf, grad in grads.items():
            what = f"the gradient of the {name} layer in {leaf}"
            expect_close(own_grads[leaf], grad, tolerance, what, largest)
        what = f"the forward derivative of the {name} layer"
        expect_close(own_moved, moved, tolerance, what, layer(layer.trained))


@law(leads=((3,),), applies=has_closed_form)
def affine_in_x(layer: Layer) -> None:
    """f(a u + c v) - f(0) = a (f(u) - f(0)) + c (f(v) - f(0)), and f(0) is the merged bias."""
    u, v, zero = layer.x, layer.x.flip(0), torch.zeros_like(layer.x)
    f = lambda x: layer(layer.trained, x)  # noqa: E731
    _, b = layer.variant.merged(layer.weight, layer.trained)
    bias = torch.zeros_like(f(zero)) if b is None else b.expand_as(f(zero))
    expect_close(f(zero), bias, 1e-10, "f(0) against the merged bias", f(u))
    combined = 0.7 * (f(u) - f(zero)) - 1.3 * (f(v) - f(zero))
    expect_close(f(0.7 * u - 1.3 * v) - f(zero), combined, 1e-10, "f(0.7 u - 1.3 v)", f(u))


@law(leads=((6,),))
def rows_are_independent(layer: Layer) -> None:
    """Reshaping, permuting and splitting the tokens commutes with the adapter."""
    x, f = layer.x, lambda x: layer(layer.trained, x)
    whole, order = f(x), torch.tensor([4, 0, 5, 2, 1, 3])
    expect_close(f(x.reshape(2, 3, -1)).reshape(6, -1), whole, 1e-12, "reshaped tokens")
    expect_close(f(x[order]), whole[order], 1e-12, "permuted tokens")
    expect_close(torch.stack([f(row) for row in x]), whole, 1e-12, "tokens one by one")
    expect(f(x[:0]).shape == (0, whole.shape[-1]), "no tokens give no output of that width")


@law(dtypes=DTYPES)
def shape_and_dtype(layer: Layer) -> None:
    """The output has those of the base output, whatever the dtype of the parameters."""
    base_out = layer.base(layer.x)
    for kept_in in DTYPES:
        leaves = {name: leaf.to(kept_in) for name, leaf in layer.leaves().items()}
        out = layer.at(leaves)
        expect(
            (out.shape, out.dtype) == (base_out.shape, base_out.dtype),
            f"parameters in {kept_in}: out is {out.dtype} of shape {tuple(out.shape)}, and the "
            f"base output {base_out.dtype} of shape {tuple(base_out.shape)}",
        )


@law(leads=((), (4,), (2, 3)), trains=True)
def vmap_is_the_loop(layer: Layer) -> None:
    """torch.vmap over stacked parameters, and over the rows of x, is the loop."""
    factors = torch.tensor([1.0, 1.1, 1.2], dtype=torch.float64)
    copies = {n: torch.stack([leaf * f for f in factors]) for n, leaf in layer.leaves().items()}
    loop = torch.stack([layer.at({n: leaf[k] for n, leaf in copies.items()}) for k in range(3)])
    tolerance = 1e-12 * layer.condition  # products under vmap may sum in another order
    expect_close(torch.vmap(layer.at)(copies), loop, tolerance, "vmap over parameters")
    if layer.x.dim() > 1:
        rows = torch.vmap(lambda row: layer(layer.trained, row))(layer.x)
        expect_close(rows, layer(layer.trained), 1e-12, "vmap over the rows of x")


@law(leads=((2,),), largest=6, applies=lambda variant: variant.exact_gradient)
def gradients(layer: Layer) -> None:
    """First and second derivatives in every leaf and in x are those of finite differences."""
    inputs = [leaf.detach().clone().requires_grad_() for leaf in layer.leaves().values()]

    def f(x: Tensor, *leaves: Tensor) -> Tensor:
        return layer({**layer.trained, **dict(zip(layer.names, leaves))}, x)

    point = (layer.x.clone().requires_grad_(), *inputs)
    try:
        torch.autograd.gradcheck(f, point, check_forward_ad=True)
        # Differences of differences lose half the digits twice.
        torch.autograd.gradgradcheck(f, point, atol=1e-4)
    except RuntimeError as error:
        numbers = textwrap.shorten(
            str(error), 400, placeholder=" .."
        )  # torch prints whole matrices
        raise Broken(f"autograd against finite differences: {numbers}") from error


@law(leads=((8,),), largest=24, trains=True)
def alive_at_init(layer: Layer) -> None:
    """Some leaf has a gradient at init, for a generic loss, and every gradient is finite."""
    target = torch.linspace(-1, 1, layer.base(layer.x).numel(), dtype=torch.float64).sin()

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        return (layer({**layer.init, **leaves}).flatten() * target).sum()

    grads = torch.func.grad(loss)({name: layer.init[name] for name in layer.names})
    sizes = {n: g.abs().max().item() if g.numel() else 0.0 for n, g in grads.items()}
    expect(all(g.isfinite().all() for g in grads.values()), f"gradients not finite: {sizes}")
    expect(max(sizes.values()) > 1e-8, f"no leaf has a gradient at init: {sizes}")


@law(leads=((8,),), largest=24, trains=True)
def every_leaf_matters(layer: Layer) -> None:
    """Moving any one trainable leaf moves the output."""
    out = layer(layer.trained)
    for name, leaf in layer.leaves().items():
        if leaf.numel():
            step = torch.linspace(0.5, 1.5, leaf.numel(), dtype=torch.float64).cos()
            change = (layer.at({name: leaf + 0.1 * step.reshape(leaf.shape)}) - out).abs().max()
            size = out.abs().max().item()
            expect(change > 1e-9 * size, f"moving {name} moves the output by {change:.3g}")


@law()
def leaves_are_those_of_the_card(layer: Layer) -> None:
    """The trainable leaves have the names and shapes that `card.trainable` says."""
    card = layer.variant.card
    if not card.trainable:
        return
    known: dict[str, int] = {"bias": layer.weight.bias is not None}
    if "A" in layer.names:
        known["r_l"] = len(layer.init["A"])  # the rank may depend on data
    declared = card.shapes(layer.variant, layer.weight.shape, **known)
    for name in declared:
        expect(name in layer.names, f"the card declares {name}, which the layer does not have")
    for name in layer.names:
        expect(name in declared, f"the card does not declare {name}")
        shape = tuple(layer.init[name].shape)
        expect(shape == declared[name], f"{name} has shape {shape}, declared as {declared[name]}")


@law()
def reads_of_the_weight(layer: Layer) -> None:
    """The variant reads no more of the weight than `card.reads` says."""
    reads = layer.variant.card.reads

    class Guarded(Weight):
        open = reads != "nothing"

        @property
        def matrix(self) -> Tensor:  # pyright: ignore
            expect(self.open, f"the dense weight was read, where the card says {reads!r}")
            return layer.weight.matrix

        @property
        def bias(self) -> Tensor | None:  # pyright: ignore
            return layer.weight.bias

        @property
        def shape(self) -> tuple[int, ...]:
            return layer.weight.shape

        @property
        def device(self) -> torch.device:
            return layer.weight.device

        def __call__(self, z: Tensor) -> Tensor:
            expect(reads == "rows", f"rows went through the weight, where the card says {reads!r}")
            return layer.weight(z)

    weight = Guarded.__new__(Guarded)
    layer.variant.init(weight, torch.Generator(), layer.stats)
    weight.open = False
    prepared = Prepared(layer.variant.prepare(weight, layer.trained, layer.x.dtype))
    weight.open = reads == "dense"
    layer(prepared, weight=weight)


@law(dtypes=(torch.float64, torch.bfloat16))
def draws_from_the_generator_alone(layer: Layer) -> None:
    """The same seed gives the same parameters, and torch's own generator is not used.

    They are in float32, or in the dtype of the weight if that is wider.
    """

    def drawn() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7)
        own = layer.variant.init(layer.weight, generator, layer.stats)
        shared = layer.variant.init_shared([layer.weight], generator)
        return own.trainable | own.frozen | shared.trainable | shared.frozen

    state = torch.get_rng_state()
    first, second = drawn(), drawn()
    for name, leaf in first.items():
        expect_equal(second[name], leaf, f"{name} drawn again from the same seed")
    expect(torch.equal(torch.get_rng_state(), state), "init drew from torch's own generator")
    wide = torch.promote_types(layer.weight.dense().dtype, torch.float32)
    for name, leaf in first.items():
        fits = leaf.dtype in (torch.float32, wide) or not leaf.is_floating_point()
        expect(fits, f"{name} is in {leaf.dtype}, not in {wide}")


@law()
def a_file_can_tell_its_leaves(layer: Layer) -> None:
    """`like` returns the names and shapes that `init` does, without data and without values."""
    drawn = layer.variant.init(layer.weight, torch.Generator().manual_seed(0), layer.stats)
    leaves = {name: leaf.to("meta") for name, leaf in {**drawn.trainable, **drawn.frozen}.items()}
    with torch.device("meta"):
        known = layer.variant.like(Weight(torch.empty(layer.weight.shape)), leaves)
    for kind in ("trainable", "frozen"):
        given = {name: tuple(leaf.shape) for name, leaf in getattr(known, kind).items()}
        expected = {name: tuple(leaf.shape) for name, leaf in getattr(drawn, kind).items()}
        expect(given == expected, f"{kind} leaves: like says {given}, init {expected}")


@law(dtypes=(torch.float32,), leads=((), (5,), (2, 3)))
def autocast(layer: Layer) -> None:
    """Under bfloat16 autocast, out has the dtype of the base output and bfloat16's accuracy."""
    with torch.autocast("cpu", torch.bfloat16):
        out, base_out = layer(layer.trained), layer.base(layer.x)
    expect(out.dtype == base_out.dtype, f"out is {out.dtype}, the base output {base_out.dtype}")
    if has_closed_form(layer.variant):
        expected, scale = layer.reference()
        tolerance = TOLERANCE[torch.bfloat16] * layer.condition
        expect_close(out, expected, tolerance, "out under autocast", scale)


@law(dtypes=(torch.float32,), leads=((5,),), largest=24)
def file_round_trip(layer: Layer) -> None:
    """Saved and loaded, an adapter has the same bits: parameters, constants and output."""
    d_out, d_in = layer.weight.shape
    linear = nn.Linear(d_in, d_out, layer.weight.bias is not None)
    linear.weight.data.copy_(layer.weight.matrix)
    if layer.weight.bias is not None:
        linear.bias.data.copy_(layer.weight.bias)
    model = nn.Sequential(linear)
    everywhere, kind = Targets(roles=()), type(layer.variant)
    stats = {"0": layer.stats} if layer.variant.looks_at_data and layer.stats is not None else None
    adapter, params = adapt(model, layer.variant, targets=everywhere, stats=stats)
    for key, name in itertools.product(list(params), layer.names):
        if key.rpartition("lora_")[2] == name and params[key].shape == layer.trained[name].shape:
            params[key] = layer.trained[name].to(params[key]).contiguous()  # as in a file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save(path, adapter, params)
        again, loaded = load(path, model, variants=[kind], check_base="error")
    expect(again.variants == adapter.variants, f"{again.variants} came back")
    for given, expected in ((loaded, params), (again.frozen, adapter.frozen)):
        expect(given.keys() == expected.keys(), f"{list(given)} came back")
        for key, leaf in expected.items():
            expect_equal(given[key], leaf, key)
    out = adapter(model, params, layer.x)
    expect_equal(again(model, loaded, layer.x), out, "the output after loading")
