"""The example axis: example i of a batch runs through its own adapter, under every transform.

The oracle is one run for each example.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from cases import catalogue
from hypothesis import given
from hypothesis import strategies as st
from models import (
    adapted,
    checkpoint_activations,
    largest,
    mlp,
    state_of,
    text_batch,
    tiny_llama,
    trained,
)
from torch import nn

import lora_func as lf

variants = catalogue()
over_variants = pytest.mark.parametrize("variant", variants.values(), ids=variants.keys())


def example(batch, i):
    return {name: t[i : i + 1] for name, t in batch.items()}


def loss_per_example(logits, labels):
    """Mean cross-entropy over the labelled tokens of each example."""
    tokens = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none", ignore_index=-100)
    return tokens.sum(1) / (labels[:, 1:] != -100).sum(1)


def losses(model, adapter, batch):
    """The function params -> losses `[examples]`."""
    return lambda params: loss_per_example(adapter(model, params, batch).logits, batch["labels"])


def total(model, adapter, batch):
    """The function params -> sum of the losses."""
    return lambda params: losses(model, adapter, batch)(params).sum()


def population(params, K=3):
    return [trained(params) for _ in range(K)]


def scale_of(grads):
    """The largest entry, and 1 at least."""
    return max(1.0, *(leaf.abs().max().item() for leaf in grads.values()))


# the four functions


@given(
    K=st.integers(1, 5),
    ids=st.lists(st.integers(0, 100), max_size=7),
    shape=st.lists(st.integers(0, 3), max_size=3),
)
def test_stack_select_unstack(K, ids, shape):
    """Round trips keep every bit of leaves of any shape. `select` picks like an index."""
    several = [{"a": torch.randn(shape), "b": torch.randn(())} for _ in range(K)]
    stacked = lf.stack(several)
    assert {key: leaf.shape for key, leaf in stacked.items()} == {"a": (K, *shape), "b": (K,)}
    for given_, expected in zip(lf.unstack(stacked), several, strict=True):
        assert all(torch.equal(given_[key], expected[key]) for key in expected)
    ids = [i % K for i in ids]
    picked = lf.select(stacked, torch.tensor(ids, dtype=torch.int64))
    assert picked["a"].shape == (len(ids), *shape)
    for n, i in enumerate(ids):
        assert all(torch.equal(picked[key][n], several[i][key]) for key in stacked)
    repeated = lf.expand(several[0], 4)
    for each in lf.unstack(repeated):
        assert all(torch.equal(leaf, several[0][key]) for key, leaf in each.items())
    held, given_ = (leaves["a"].untyped_storage().data_ptr() for leaves in (several[0], repeated))
    assert held == given_  # no copy


def test_gradients_flow_through():
    """An adapter gets the sum of the gradients of the examples that selected it."""
    several = [{"a": torch.ones(2, requires_grad=True)} for _ in range(3)]
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    picked = lf.select(lf.stack(several), torch.tensor([0, 2, 0, 2]))
    (picked["a"] * weights[:, None]).sum().backward()
    grads = [params["a"].grad.tolist() for params in several]
    assert grads == [[101.0, 101.0], [0.0, 0.0], [1010.0, 1010.0]]


bad: Any = lf  # for calls that a type checker refuses, too


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: bad.stack([]), "a list of at least one dict of parameters, not nothing"),
        (
            lambda: bad.stack({"a": torch.ones(2)}),
            "at least one dict of parameters, not a list of str",
        ),
        (
            lambda: bad.stack([{"a": torch.ones(2)}, {"b": torch.ones(2)}]),
            "differ in the keys 'a', 'b'.*one after the other",
        ),
        (
            lambda: bad.stack([{"a": torch.ones(2)}, {"a": torch.ones(3)}]),
            r"'a' is torch.float32 of shape \(3,\) in adapter 1",
        ),
        (
            lambda: bad.stack([{"a": torch.ones(2)}, {"a": torch.ones(2).half()}]),
            "'a' is torch.float16 .* in adapter 1",
        ),
        (
            lambda: bad.unstack({"a": torch.ones(2), "b": torch.ones(3)}),
            r"do not share a leading axis: 'a' \(2,\), 'b' \(3,\)",
        ),
        (lambda: bad.unstack({"a": torch.ones(())}), r"do not share a leading axis: 'a' \(\)"),
        (lambda: bad.unstack({}), "do not share a leading axis: there is none"),
        (
            lambda: bad.select(
                {"a": torch.ones(2, 3)},
                [0, 1],
            ),
            r"int64 tensor of shape \[examples\].* not \[0, 1\]",
        ),
        (
            lambda: bad.select({"a": torch.ones(2, 3)}, torch.tensor([0.0])),
            r", not torch.float32 of shape \(1,\)",
        ),
        (
            lambda: bad.select({"a": torch.ones(2, 3)}, torch.tensor(1)),
            r", not torch.int64 of shape \(\)",
        ),
        (
            lambda: bad.select({"a": torch.ones(2, 3)}, torch.tensor([0, 2])),
            r"ids out of range: \[0, 2\] for a population of 2",
        ),
        (
            lambda: bad.select({"a": torch.ones(2, 3)}, torch.tensor([-1])),
            r"ids out of range: \[-1\]",
        ),
        (lambda: bad.expand({"a": torch.ones(2)}, 0), "an integer of at least 1, not 0"),
        (
            lambda: bad.expand({"a": torch.ones(2)}, 2.0),
            "an integer of at least 1, not 2.0",
        ),
    ],
)
def test_errors_of_the_four(call, text):
    with pytest.raises(lf.LoraFuncError, match=text):
        call()


# the engine


@over_variants
def test_each_example_runs_through_its_own_adapter(variant):
    """One pass gives the outputs and gradients of one run for each example, padded or not.

    The model is untouched.
    """
    model, adapter, params = adapted(variant, targets=lf.Targets(names=(r"(q|v|down)_proj$",)))
    before = state_of(model)
    batch = text_batch()
    several = population(params)
    stacked = lf.stack(several)
    given_ = adapter(model, stacked, batch).logits
    alone = [adapter(model, p, example(batch, i)).logits for i, p in enumerate(several)]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(given_[real], torch.cat(alone)[real], rtol=1e-5, atol=1e-6)

    grads = torch.func.grad(total(model, adapter, batch))(stacked)
    of_each = [
        torch.func.grad(total(model, adapter, example(batch, i)))(p) for i, p in enumerate(several)
    ]
    assert largest(grads, lf.stack(of_each)) <= 1e-6 * scale_of(grads)
    assert state_of(model) == before


@over_variants
def test_per_sample_gradients(variant):
    """The gradient in expanded parameters holds, for each example, the gradient of it alone."""
    model, adapter, params = adapted(variant, tiny_llama(attn_implementation="eager"))
    batch = text_batch()
    _, grads = lf.value_and_grad(total(model, adapter, batch))(lf.expand(params, 3))
    of_each = [torch.func.grad(total(model, adapter, example(batch, i)))(params) for i in range(3)]
    assert largest(grads, lf.stack(of_each)) <= 1e-6 * scale_of(grads)

    def one(p, ids, mask, labels):
        batch = {"input_ids": ids[None], "attention_mask": mask[None], "labels": labels[None]}
        return losses(model, adapter, batch)(p)[0]

    mapped = torch.vmap(torch.func.grad(one), (None, 0, 0, 0))(params, *batch.values())
    assert largest(grads, mapped) <= 1e-6 * scale_of(grads)


@over_variants
def test_leaves_with_and_without_the_axis(variant):
    """Any subset of the leaves may have it."""
    model, adapter, params = adapted(variant)
    batch, several = text_batch(), population(params)
    for start in (0, 1):
        keys = list(params)[start::2]
        own = [{key: p[key] for key in keys} for p in several]
        mixed = adapter(model, {**params, **lf.stack(own)}, batch).logits
        alone = [adapter(model, {**params, **p}, batch).logits[i] for i, p in enumerate(own)]
        torch.testing.assert_close(mixed, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_a_mixed_batch_of_selected_adapters():
    model, adapter, params = adapted(lf.DoRA(r=4))
    several, batch, ids = population(params), text_batch(rows=5), torch.tensor([2, 0, 2, 1, 2])
    given_ = adapter(model, lf.select(lf.stack(several), ids), batch).logits
    expected = torch.stack([adapter(model, several[k], batch).logits[i] for i, k in enumerate(ids)])
    torch.testing.assert_close(given_, expected, rtol=1e-5, atol=1e-6)


def test_low_precision_identity():
    """A population at init is the base, to the bit."""
    model, batch = tiny_llama().bfloat16(), text_batch()
    adapter, _ = lf.adapt(model, lf.PiSSA(r=4))
    stacked = lf.stack([adapter.init(model) for _ in range(3)])
    assert torch.equal(adapter(model, stacked, batch).logits, model(**batch).logits)


@over_variants
def test_composes_with_transforms(variant):
    """vmap over populations, jvp, and Hessian-vector products, each against the loop."""
    base = tiny_llama(attn_implementation="eager").double()
    model, adapter, params = adapted(variant, base, dtype=torch.float64)
    batch = text_batch()
    f = total(model, adapter, batch)
    several = [lf.stack(population(params)) for _ in range(2)]
    given_ = torch.vmap(torch.func.grad(f))(lf.stack(several))
    assert largest(given_, lf.stack([torch.func.grad(f)(p) for p in several])) <= 1e-10

    points = population(params)
    tangents = [{key: torch.randn_like(leaf) for key, leaf in p.items()} for p in points]
    of_example = [total(model, adapter, example(batch, i)) for i in range(3)]
    slope = torch.func.jvp(f, (lf.stack(points),), (lf.stack(tangents),))[1]
    slopes = [torch.func.jvp(f_i, (p,), (t,))[1] for f_i, p, t in zip(of_example, points, tangents)]
    torch.testing.assert_close(slope, sum(slopes))
    hvp = torch.func.jvp(torch.func.grad(f), (lf.stack(points),), (lf.stack(tangents),))[1]
    alone = [
        torch.func.jvp(torch.func.grad(f_i), (p,), (t,))[1]
        for f_i, p, t in zip(of_example, points, tangents)
    ]
    scale = max(leaf.abs().max().item() for leaf in hvp.values())
    assert largest(hvp, lf.stack(alone)) <= 1e-6 * scale  # Llama's norms are float32


@over_variants
def test_compiled(variant):
    """Forward and gradient are one graph. Other parameters cause no second one."""
    torch._dynamo.reset()
    model, adapter, params = adapted(variant)
    f = total(model, adapter, text_batch())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch.func.grad(f), fullgraph=True, backend=counter)
    for _ in range(2):
        stacked = lf.stack(population(params))
        assert largest(compiled(stacked), torch.func.grad(f)(stacked)) <= 1e-5
    assert counter.frame_count == 1


@over_variants
def test_bound_and_checkpointed(variant):
    """A bound population is a model.

    Activation checkpointing recomputes each example through its own adapter.
    """
    model, adapter, params = adapted(variant)
    batch, stacked = text_batch(), lf.stack(population(params))
    logits = lf.bind(adapter, model, stacked)(**batch).logits
    assert torch.equal(logits, adapter(model, stacked, batch).logits)
    f = total(model, adapter, batch)
    model.train()
    _, expected = lf.value_and_grad(f)(stacked)
    checkpoint_activations(model, use_reentrant=False)
    _, grads = lf.value_and_grad(f)(stacked)
    assert largest(grads, expected) == 0


@over_variants
def test_generate_with_an_adapter_for_each_prompt(variant):
    """Each left-padded prompt of a batch is continued by its own adapter, as it is alone."""
    model, adapter, params = adapted(variant)
    several, batch = population(params), text_batch(pad="left")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    together = lf.bind(adapter, model, lf.stack(several)).generate(**prompt, **options)
    for i, p in enumerate(several):
        alone = lf.bind(adapter, model, p).generate(**example(prompt, i), **options)
        assert torch.equal(together[i], alone[0])


def test_inputs_without_a_token_axis():
    """x [examples, d_in]: each function sees a vector."""
    model = mlp()
    adapter, params = lf.adapt(model, lf.HRA(r=2), targets=lf.Targets(roles=()))
    several, x = population(params), torch.randn(3, 6)
    expected = torch.stack([adapter(model, p, x)[i] for i, p in enumerate(several)])
    torch.testing.assert_close(adapter(model, lf.stack(several), x), expected)


# errors


class TimeMajor(nn.Module):
    """Two layers, and a function that moves the examples between them."""

    def __init__(self, move):
        super().__init__()
        self.move, self.first, self.second = move, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(self.move(self.first(x)))


@pytest.mark.parametrize(
    "move",
    [lambda h: h.transpose(0, 1), lambda h: h.flatten(0, 1), lambda h: h[0, 0]],
    ids=range(3),
)
def test_a_model_that_moves_the_examples(move):
    model = TimeMajor(move)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(roles=()))
    message = r"'second' sees an input of shape .* not that of the 3 examples"
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter(model, lf.stack(population(params)), torch.randn(3, 4, 6))


def test_a_batch_of_another_size():
    model, adapter, params = adapted()
    message = r"first axis is not that of the 2 examples .*: the batch has another size"
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter(model, lf.stack(population(params, 2)), text_batch(rows=3))


def test_an_input_without_an_example_axis():
    """One vector, with as many entries as there are examples, has none."""
    model = nn.Linear(6, 6)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(roles=()))
    message = r"sees an input of shape \(6,\), whose first axis is not that of the 6 examples"
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter(model, lf.stack(population(params, 6)), torch.randn(6))


def test_shapes_that_are_no_example_axis():
    model, adapter, params = adapted()
    key, other = list(params)[:2]
    message = r"where \(4, 32\) was expected, or \('n', 4, 32\) with an example axis"
    for leaf in (params[key][None, None], params[key][0], params[key].mT[None]):
        with pytest.raises(lf.LoraFuncError, match=message):
            adapter(model, {**params, key: leaf}, text_batch())
    three, two = params[key].expand(3, 4, 32), params[other].expand(2, 48, 4)
    message = "the example axis of .* has length 2, and that of .* 3"
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter(model, {**params, key: three, other: two}, text_batch())


def test_one_adapter_is_merged_and_saved(tmp_path):
    model, adapter, params = adapted()
    several, file = population(params), tmp_path / "a.safetensors"
    stacked = lf.stack(several)
    message = "it has an example axis. Take one adapter of it, as in lf.unstack"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.merge(adapter, model, stacked)
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.save(file, adapter, stacked)
    assert not list(tmp_path.iterdir())
    one = lf.unstack(stacked)[1]
    expected = lf.merge(adapter, model, several[1])
    assert largest(lf.merge(adapter, model, one), expected) == 0
    lf.save(file, adapter, one)
    assert largest(lf.load(file, model)[1], several[1]) == 0


# training


@over_variants
def test_a_population_trains_as_each_adapter_alone(variant):
    """Twenty steps with K parameter groups of different rates end where K runs end."""
    model, adapter, params = adapted(variant)
    starts, rates = population(params), [1e-3, 3e-3, 1e-2]
    batches = [text_batch() for _ in range(4)]

    def fresh(p):
        return {key: leaf.clone().requires_grad_() for key, leaf in p.items()}

    together = [fresh(p) for p in starts]
    groups = [{"params": list(p.values()), "lr": rate} for p, rate in zip(together, rates)]
    optimizer = torch.optim.AdamW(groups)
    for step in range(20):
        optimizer.zero_grad()
        total(model, adapter, batches[step % 4])(lf.stack(together)).backward()
        optimizer.step()
    for i, (start, rate) in enumerate(zip(starts, rates)):
        alone = fresh(start)
        optimizer = torch.optim.AdamW(list(alone.values()), lr=rate)
        for step in range(20):
            optimizer.zero_grad()
            total(model, adapter, example(batches[step % 4], i))(alone).backward()
            optimizer.step()
        scale = max(leaf.abs().max().item() for leaf in alone.values())
        assert largest(together[i], alone) <= 1e-4 * scale  # float32, over 20 steps
        assert largest(alone, start) > 5 * rate  # it has moved


class Gated(lf.LoRA):
    """A user's: the gate `[d_out]` would go along the wrong axis of `[n, rows, d_out]`."""

    def init(self, weight, generator, stats=None):
        drawn = super().init(weight, generator, stats).trainable
        return lf.Params({**drawn, "g": torch.ones(weight.shape[0])})

    def prepare(self, weight, params, dtype):
        return {name: leaf.to(dtype) for name, leaf in params.items()}

    def apply(self, x, base_out, weight, params):
        p = self.prepared(weight, params, x.dtype)
        return base_out + x @ p["A"].mT @ p["B"].mT * p["g"]


def test_a_subclass_that_overrides_apply_is_mapped():
    """Also where the base class takes all examples at once, and as many rows as examples."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    adapter, _ = lf.adapt(model, Gated(r=2), targets=lf.Targets(names=("0",), roles=()))
    each = [trained(adapter.init(model)) for _ in range(3)]
    x = torch.randn(3, 3, 6)
    loop = torch.cat([adapter(model, params, row[None]) for params, row in zip(each, x)])
    torch.testing.assert_close(adapter(model, lf.stack(each), x), loop)
    found = [variant.broadcasts for variant in (lf.LoRA(), Gated(), lf.GraLoRA())]
    assert found == [True, False, False]
