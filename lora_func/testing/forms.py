"""The laws of the forms in which the engine runs a variant: each is the one function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.examples import Entries
from ..engine.together import prepare_together
from ..variant import Prepared, Variant, Weight
from . import laws  # noqa: F401  (which come first)
from .law import TOLERANCE, expect, expect_close, expect_equal, law
from .layer import Layer


@law(dtypes=(torch.float32, torch.bfloat16))
def two_steps_are_one_function(layer: Layer) -> None:
    """`apply` of what `prepare` returned is `apply` of the parameters, to the bit.

    Also if they were prepared for a wider dtype.
    """
    out, dtype = layer(layer.trained), layer.x.dtype
    for wide in (dtype, torch.promote_types(dtype, torch.float32)):
        prepared = Prepared(layer.variant.prepare(layer.weight, layer.trained, wide))
        expect_equal(layer(prepared), out, f"prepared for {wide}")


@law(leads=((3, 4),), trains=True, applies=lambda variant: variant.broadcasts)
def examples_are_the_loop(layer: Layer) -> None:
    """Three examples at once, with leaves of their own, are the loop; also if they share some."""
    leaves, dtype = layer.leaves(), layer.x.dtype
    for own in (set(leaves), *({name} for name in leaves)):
        each = []
        for k in range(3):
            changed = {name: leaf * (1 + 0.1 * k) for name, leaf in leaves.items() if name in own}
            params = {**layer.trained, **changed}
            each.append(Prepared(layer.variant.prepare(layer.weight, params, dtype)))
        at_once = {}
        for name, first in each[0].items():
            alike = all(torch.equal(first, params[name]) for params in each)
            at_once[name] = first if alike else torch.stack([params[name] for params in each])
        loop = torch.stack([layer(params, x) for params, x in zip(each, layer.x)])
        tolerance = 1e-12 * layer.condition  # batched products may sum in another order
        expect_close(layer(Prepared(at_once)), loop, tolerance, f"own leaves {sorted(own)}")


@law(dtypes=(torch.bfloat16,), leads=((1,),), applies=lambda variant: variant.rounds_last)
def rounding_comes_last(layer: Layer) -> None:
    """What is prepared for bfloat16 is what is prepared for float32, rounded."""
    low, wide = (
        layer.variant.prepared(layer.weight, layer.trained, dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    for name, t in wide.items():
        rounded = t.to(torch.bfloat16) if t.is_floating_point() else t
        expect_equal(low[name], rounded, f"{name}, prepared for torch.bfloat16")


@law(applies=lambda variant: variant.prepares_together)
def prepared_together(layer: Layer) -> None:
    """`prepare` of three layers at once, under vmap over them, is that of each."""
    variant, bias, dtype = layer.variant, layer.weight.bias, layer.x.dtype
    weights, entries = [], []
    for k in range(3):
        scale = 1 + 0.1 * k
        weights.append(Weight(scale * layer.weight.matrix, None if bias is None else scale * bias))
        own = {name: scale * leaf for name, leaf in layer.leaves().items()}
        entries.append(Entries({**layer.trained, **own}, (), None))
    at_once = prepare_together(variant, weights, entries, frozenset(), dtype)
    for k, (weight, (params, *_), (made, *_)) in enumerate(zip(weights, entries, at_once)):
        alone = variant.prepared(weight, params, dtype)
        expect(made.keys() == alone.keys(), f"together {list(made)}, alone {list(alone)}")
        for name, t in alone.items():
            # Sums of many layers' products may be made in another order.
            expect_close(made[name], t, 1e-12 * layer.condition, f"{name} of layer {k}")


def has_fused(variant: Variant) -> bool:
    """Whether the variant has a `fused` of its own."""
    return type(variant).fused is not Variant.fused


@law(applies=has_fused)
def fused_is_apply(layer: Layer) -> None:
    """`fused` is `apply` of the layer's output: its values, its gradients, its bits at init."""
    names, (W, b) = ("x", *layer.names), (layer.weight.matrix, layer.weight.bias)
    at_init = layer.variant.prepared(layer.weight, layer.init, layer.x.dtype)
    base_out = layer(at_init)
    if layer.variant.card.at_init == "exact":
        expect_equal(layer.variant.fused(layer.x, W, b, at_init), base_out, "fused at init")

    def of(fused: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        x = layer.x.clone().requires_grad_()
        leaves = {n: t.detach().clone().requires_grad_() for n, t in layer.leaves().items()}
        params = layer.variant.prepared(layer.weight, {**layer.trained, **leaves}, x.dtype)
        out = layer.variant.fused(x, W, b, params) if fused else layer(params, x)
        loss = (out * torch.linspace(-1, 1, out.numel()).to(out).view_as(out)).sum()
        return out, torch.autograd.grad(loss, (x, *leaves.values()), allow_unused=True)

    (out, grads), (expected, theirs) = of(True), of(False)
    tolerance = TOLERANCE[layer.x.dtype] * layer.condition
    expect_close(out, expected, tolerance, "fused against apply", layer.base(layer.x))
    # A gradient may be nothing but what is left when two parts cancel: with its norm in the
    # gradient, DoRA does not feel the length of a row. So the largest of all is the measure.
    largest = max((g for g in theirs if g is not None and g.numel()), key=lambda g: g.abs().max())
    for name, grad, other in zip(names, grads, theirs):
        expect((grad is None) == (other is None), f"only one of the two forms has d / d {name}")
        if grad is not None and other is not None:
            expect_close(grad, other, tolerance, f"the gradient of fused in {name}", largest)
