"""`each`: an entry of the example axis serves several examples, one after the other, uncopied.

The oracle is `select` with each id repeated.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import catalogue
from models import adapted, checkpoint_activations, largest, mlp, text_batch, tiny_llama, trained
from torch import Tensor

import lora_func as lf

K, EACH = 3, 2
IDS = torch.arange(K).repeat_interleave(EACH)
LENGTH = {"min_new_tokens": 6, "max_new_tokens": 6}

variants = catalogue()
over_variants = pytest.mark.parametrize("variant", variants.values(), ids=variants.keys())
# Those that broadcast and those that are mapped, that prepare much and that act on the input.
over_kinds = pytest.mark.parametrize("name", ["lora", "pissa", "dora", "hra", "oft", "ia3ff"])


def stacked(params):
    return lf.stack([trained(params) for _ in range(K)])


def both(model, adapter, batch):
    """Two functions of a population to a loss that weighs the examples: by `each`, by `select`."""
    weights = torch.arange(1.0, len(IDS) + 1)[:, None, None]

    def by_each(population):
        logits = adapter(model, population, batch, each=EACH).logits
        return (weights * logits.square()).mean()

    def by_select(population):
        logits = adapter(model, lf.select(population, IDS), batch).logits
        return (weights * logits.square()).mean()

    return by_each, by_select


def scale_of(grads):
    return max(1.0, *(leaf.abs().max().item() for leaf in grads.values()))


@over_variants
def test_it_is_select(variant):
    """Outputs and gradients, of padded examples, also where some leaves are shared by all."""
    model, adapter, params = adapted(variant, targets=lf.Targets(names=(r"(q|v|down)_proj$",)))
    batch, population = text_batch(rows=len(IDS)), stacked(params)
    given = adapter(model, population, batch, each=EACH).logits
    wanted = adapter(model, lf.select(population, IDS), batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(given[real], wanted[real], rtol=1e-5, atol=1e-6)
    given, wanted = (torch.func.grad(f)(population) for f in both(model, adapter, batch))
    assert largest(given, wanted) <= 1e-6 * scale_of(wanted)
    key = next(iter(params))
    mixed = {**params, key: population[key]}
    given = adapter(model, mixed, batch, each=EACH).logits
    picked = {**params, **lf.select({key: population[key]}, IDS)}
    torch.testing.assert_close(given, adapter(model, picked, batch).logits, rtol=1e-5, atol=1e-6)


@over_kinds
def test_it_composes_with_transforms(name):
    """vmap over populations, jvp, and Hessian-vector products."""
    base = tiny_llama(attn_implementation="eager").double()
    model, adapter, params = adapted(variants[name], base, dtype=torch.float64)
    by_each, by_select = both(model, adapter, text_batch(rows=len(IDS)))
    several = lf.stack([stacked(params) for _ in range(2)])
    given, wanted = (torch.vmap(torch.func.grad(f))(several) for f in (by_each, by_select))
    assert largest(given, wanted) <= 1e-10 * scale_of(wanted)
    point = lf.unstack(several)[0]
    tangent = {key: torch.randn_like(leaf) for key, leaf in point.items()}
    given, wanted = (torch.func.jvp(f, (point,), (tangent,))[1] for f in (by_each, by_select))
    torch.testing.assert_close(given, wanted)
    given, wanted = (
        torch.func.jvp(torch.func.grad(f), (point,), (tangent,))[1] for f in (by_each, by_select)
    )
    assert largest(given, wanted) <= 1e-6 * scale_of(wanted)  # Llama's norms are float32


@pytest.mark.parametrize("name", ["lora", "oft"])  # one that broadcasts, one that is mapped
def test_compiled(name):
    """Forward and gradient are one graph. Other parameters cause no second one."""
    torch._dynamo.reset()
    model, adapter, params = adapted(variants[name])
    by_each, _ = both(model, adapter, text_batch(rows=len(IDS)))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch.func.grad(by_each), fullgraph=True, backend=counter)
    for _ in range(2):
        population = stacked(params)
        assert largest(compiled(population), torch.func.grad(by_each)(population)) <= 1e-5
    assert counter.frame_count == 1


@over_kinds
def test_bound_and_checkpointed(name):
    model, adapter, params = adapted(variants[name])
    batch, population = text_batch(rows=len(IDS)), stacked(params)
    module = lf.bind(adapter, model, population, each=EACH)
    wanted = adapter(model, population, batch, each=EACH).logits
    assert torch.equal(module(**batch).logits, wanted)
    by_each, _ = both(model, adapter, batch)
    model.train()
    _, expected = lf.value_and_grad(by_each)(population)
    checkpoint_activations(model, use_reentrant=False)
    _, grads = lf.value_and_grad(by_each)(population)
    assert largest(grads, expected) == 0


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(beams):
    """Prompt i is continued by adapter `i // each`, on all of its beams, as it is alone."""
    model = tiny_llama().double()
    _, adapter, params = adapted(lf.DoRA(r=2), model)
    several = [trained(params, noise=0.5) for _ in range(K)]
    ids = torch.randint(1, 60, (len(IDS), 5))
    module: Any = lf.bind(adapter, model, lf.stack(several), each=EACH)
    given = module.generate(ids, num_beams=beams, **LENGTH)
    for i, row in enumerate(ids):
        alone: Any = lf.bind(adapter, model, several[i // EACH])
        assert torch.equal(alone.generate(row[None], num_beams=beams, **LENGTH)[0], given[i])
    with pytest.raises(lf.LoraFuncError, match=r"generate got 3 prompts, but .* for 6"):
        module.generate(ids[:K], **LENGTH)


def saved_bytes(run) -> int:
    """What autograd keeps for the backward of `run()`, in bytes."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(seen.values())


def test_the_cost_follows_the_adapters():
    """No tensor of a step has a copy of the factors for each of the examples."""
    model = mlp()
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(roles=()))
    population = {key: leaf.requires_grad_() for key, leaf in stacked(params).items()}
    x, ids = torch.randn(K * 100, 6), torch.arange(K).repeat_interleave(100)
    given = adapter(model, population, x, each=100)
    torch.testing.assert_close(given, adapter(model, lf.select(population, ids), x))
    shared = saved_bytes(lambda: adapter(model, population, x, each=100))
    copied = saved_bytes(lambda: adapter(model, lf.select(population, ids), x))
    factors = 4 * sum(leaf.numel() for leaf in population.values())
    assert copied - shared > 50 * factors


def test_more_rows_than_that_are_refused():
    model, adapter, params = adapted()
    population = stacked(params)
    for rows in (K, 4 * K):
        message = "first axis is not that of the 6 examples .*: the batch has another size"
        with pytest.raises(lf.LoraFuncError, match=message):
            adapter(model, population, text_batch(rows=rows), each=EACH)
    with pytest.raises(lf.LoraFuncError, match="say each=4 instead of each=2"):
        adapter(model, population, text_batch(rows=4 * K), each=EACH)


def test_an_input_without_an_example_axis():
    """A vector with as many entries as there are examples: another `each` would not help."""
    model = torch.nn.Linear(6, 6)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(roles=()))
    with pytest.raises(lf.LoraFuncError, match=r"shape \(6,\).*without the example axis$"):
        adapter(model, stacked(params), torch.randn(6), each=EACH)


def in_parameters(each):
    model = tiny_llama()
    targets = lf.Targets(parameters=(r"embed_tokens\.weight$",))
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=targets)
    adapter(model, lf.stack([params] * K), text_batch(rows=K * each), each=each)


def in_layers(each: Any, axis=True):
    model, adapter, params = adapted()
    adapter(model, stacked(params) if axis else params, text_batch(), each=each)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: in_layers(0), "an integer of at least 1, not 0"),
        (lambda: in_layers(2.0), "an integer of at least 1, not 2.0"),
        (lambda: in_layers([1, 2]), r"an integer of at least 1, not \[1, 2\]"),
        (lambda: in_layers(2, axis=False), "each=2 was given, and params have no example axis"),
        (lambda: in_parameters(2), r"acts on the parameters 'model.embed_tokens.weight'.*select"),
    ],
)
def test_errors(call, text):
    with pytest.raises(lf.LoraFuncError, match=text):
        call()
