"""The example axis: example i of a batch through its own adapter, equal to one run for each, under every transform."""

from __future__ import annotations

import functools

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
    return lambda params: loss_per_example(adapter(model, params, batch).logits, batch["labels"])


def population(params, K=3):
    return [trained(params) for _ in range(K)]


# the four functions


@given(
    K=st.integers(1, 5),
    ids=st.lists(st.integers(0, 100), max_size=7),
    shape=st.lists(st.integers(0, 3), max_size=3),
)
def test_stack_select_unstack(K, ids, shape):
    """Round trips to the bit, for leaves of any shape; a gather picks what indexing picks."""
    several = [{"a": torch.randn(shape), "b": torch.randn(())} for _ in range(K)]
    stacked = lf.stack(several)
    assert {key: leaf.shape for key, leaf in stacked.items()} == {"a": (K, *shape), "b": (K,)}
    for given_, expected in zip(lf.unstack(stacked), several, strict=True):
        assert all(torch.equal(given_[key], expected[key]) for key in expected)
    ids = [i % K for i in ids]
    picked = lf.select(stacked, torch.tensor(ids, dtype=torch.int64))
    assert picked["a"].shape == (len(ids), *shape)
    assert all(
        torch.equal(picked[key][n], several[i][key]) for n, i in enumerate(ids) for key in stacked
    )
    repeated = lf.expand(several[0], 4)
    assert all(
        torch.equal(leaf, several[0][key])
        for each in lf.unstack(repeated)
        for key, leaf in each.items()
    )
    assert (
        repeated["a"].untyped_storage().data_ptr() == several[0]["a"].untyped_storage().data_ptr()
    )


def test_gradients_flow_through():
    """select sums over the examples that picked an adapter; stack sends each adapter its own."""
    several = [{"a": torch.ones(2, requires_grad=True)} for _ in range(3)]
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    picked = lf.select(lf.stack(several), torch.tensor([0, 2, 0, 2]))
    (picked["a"] * weights[:, None]).sum().backward()
    assert [params["a"].grad.tolist() for params in several] == [
        [101.0] * 2,
        [0.0] * 2,
        [1010.0] * 2,
    ]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: lf.stack([]), "a list of at least one dict of parameters, and not nothing"),
        (
            lambda: lf.stack({"a": torch.ones(2)}),
            "at least one dict of parameters, and not a list of str",
        ),
        (
            lambda: lf.stack([{"a": torch.ones(2)}, {"b": torch.ones(2)}]),
            "differ in the keys 'a', 'b'.*one after the other",
        ),
        (
            lambda: lf.stack([{"a": torch.ones(2)}, {"a": torch.ones(3)}]),
            r"'a' is torch.float32 of shape \(3,\) in adapter 1",
        ),
        (
            lambda: lf.stack([{"a": torch.ones(2)}, {"a": torch.ones(2).half()}]),
            "'a' is torch.float16 .* in adapter 1",
        ),
        (
            lambda: lf.unstack({"a": torch.ones(2), "b": torch.ones(3)}),
            r"do not share a leading axis: 'a' \(2,\), 'b' \(3,\)",
        ),
        (lambda: lf.unstack({"a": torch.ones(())}), r"do not share a leading axis: 'a' \(\)"),
        (lambda: lf.unstack({}), "do not share a leading axis: there is none"),
        (
            lambda: lf.select({"a": torch.ones(2, 3)}, [0, 1]),
            r"int64 tensor of shape \[examples\].* and not \[0, 1\]",
        ),
        (
            lambda: lf.select({"a": torch.ones(2, 3)}, torch.tensor([0.0])),
            r"and not torch.float32 of shape \(1,\)",
        ),
        (
            lambda: lf.select({"a": torch.ones(2, 3)}, torch.tensor(1)),
            r"and not torch.int64 of shape \(\)",
        ),
        (
            lambda: lf.select({"a": torch.ones(2, 3)}, torch.tensor([0, 2])),
            r"ids out of range: \[0, 2\] for a population of 2",
        ),
        (
            lambda: lf.select({"a": torch.ones(2, 3)}, torch.tensor([-1])),
            r"ids out of range: \[-1\]",
        ),
        (lambda: lf.expand({"a": torch.ones(2)}, 0), "an integer of at least 1, and not 0"),
        (lambda: lf.expand({"a": torch.ones(2)}, 2.0), "an integer of at least 1, and not 2.0"),
    ],
)
def test_errors_of_the_four(call, text):
    with pytest.raises(lf.LoraFuncError, match=text):
        call()


# the engine


@over_variants
def test_each_example_runs_through_its_own_adapter(variant):
    """Outputs and gradients equal those of one run for each example, with padding, in one pass; the model is untouched."""
    model, adapter, params = adapted(variant, targets=lf.Targets(names=(r"(q|v|down)_proj$",)))
    before = state_of(model)
    batch = text_batch()
    several = population(params)
    stacked = lf.stack(several)
    given_ = adapter(model, stacked, batch).logits
    expected = torch.cat(
        [adapter(model, p, example(batch, i)).logits for i, p in enumerate(several)]
    )
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(given_[real], expected[real], rtol=1e-5, atol=1e-6)

    grads = torch.func.grad(lambda p: losses(model, adapter, batch)(p).sum())(stacked)
    alone = [
        torch.func.grad(lambda p, i=i: losses(model, adapter, example(batch, i))(p)[0])(p)
        for i, p in enumerate(several)
    ]
    assert largest(grads, lf.stack(alone)) <= 1e-6 * max(
        1, *(leaf.abs().max() for leaf in grads.values())
    )
    assert state_of(model) == before


@over_variants
def test_per_sample_gradients(variant):
    """Expanded parameters: the gradient of the summed loss is, example by example, that of the example alone."""
    model, adapter, params = adapted(variant, tiny_llama(attn_implementation="eager"))
    batch = text_batch()
    _, grads = lf.value_and_grad(lambda p: losses(model, adapter, batch)(p).sum())(
        lf.expand(params, 3)
    )
    alone = [
        torch.func.grad(lambda p, i=i: losses(model, adapter, example(batch, i))(p)[0])(params)
        for i in range(3)
    ]
    scale = max(leaf.abs().max() for leaf in grads.values())
    assert largest(grads, lf.stack(alone)) <= 1e-6 * max(1, scale)

    def one(p, ids, mask, labels):
        batch = {"input_ids": ids[None], "attention_mask": mask[None], "labels": labels[None]}
        return losses(model, adapter, batch)(p)[0]

    mapped = torch.vmap(torch.func.grad(one), (None, 0, 0, 0))(params, *batch.values())
    assert largest(grads, mapped) <= 1e-6 * max(1, scale)


@over_variants
def test_leaves_with_and_without_the_axis(variant):
    """Any subset of the leaves may have it."""
    model, adapter, params = adapted(variant)
    batch, several = text_batch(), population(params)
    for parity in (0, 1):
        own = [key for i, key in enumerate(params) if i % 2 == parity]
        mixed = {**params, **lf.stack([{key: p[key] for key in own} for p in several])}
        one_by_one = [
            adapter(model, {**params, **{key: p[key] for key in own}}, batch).logits[i]
            for i, p in enumerate(several)
        ]
        torch.testing.assert_close(
            adapter(model, mixed, batch).logits, torch.stack(one_by_one), rtol=1e-5, atol=1e-6
        )


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
    model, adapter, params = adapted(
        variant, tiny_llama(attn_implementation="eager").double(), dtype=torch.float64
    )
    batch = text_batch()
    f = lambda p: losses(model, adapter, batch)(p).sum()  # noqa: E731
    several = [lf.stack(population(params)) for _ in range(2)]
    given_ = torch.vmap(torch.func.grad(f))(lf.stack(several))
    assert largest(given_, lf.stack([torch.func.grad(f)(p) for p in several])) <= 1e-10

    points = population(params)
    tangents = [{key: torch.randn_like(leaf) for key, leaf in p.items()} for p in points]
    of_example = [lambda p, i=i: losses(model, adapter, example(batch, i))(p)[0] for i in range(3)]
    _, slope = torch.func.jvp(f, (lf.stack(points),), (lf.stack(tangents),))
    slopes = [torch.func.jvp(f_i, (p,), (t,))[1] for f_i, p, t in zip(of_example, points, tangents)]
    torch.testing.assert_close(slope, sum(slopes))
    _, hvp = torch.func.jvp(torch.func.grad(f), (lf.stack(points),), (lf.stack(tangents),))
    alone = [
        torch.func.jvp(torch.func.grad(f_i), (p,), (t,))[1]
        for f_i, p, t in zip(of_example, points, tangents)
    ]
    assert largest(hvp, lf.stack(alone)) <= 1e-6 * max(
        leaf.abs().max() for leaf in hvp.values()
    )  # Llama's norms are float32


@over_variants
def test_compiled(variant):
    """One graph for forward and gradient, and none more for other parameters."""
    torch._dynamo.reset()
    model, adapter, params = adapted(variant)
    batch = text_batch()
    f = lambda p: losses(model, adapter, batch)(p).sum()  # noqa: E731
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch.func.grad(f), fullgraph=True, backend=counter)
    for _ in range(2):
        stacked = lf.stack(population(params))
        assert largest(compiled(stacked), torch.func.grad(f)(stacked)) <= 1e-5
    assert counter.frame_count == 1


@over_variants
def test_bound_and_checkpointed(variant):
    """A bound population is a model; activation checkpointing recomputes each example through its own adapter."""
    model, adapter, params = adapted(variant)
    batch, stacked = text_batch(), lf.stack(population(params))
    assert torch.equal(
        lf.bind(adapter, model, stacked)(**batch).logits, adapter(model, stacked, batch).logits
    )
    f = lambda p: losses(model, adapter, batch)(p).sum()  # noqa: E731
    model.train()
    _, expected = lf.value_and_grad(f)(stacked)
    checkpoint_activations(model, use_reentrant=False)
    _, grads = lf.value_and_grad(f)(stacked)
    assert largest(grads, expected) == 0


@over_variants
def test_generate_with_an_adapter_for_each_prompt(variant):
    """Left-padded prompts of one batch, each continued by its own adapter, as each would be alone."""
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


# what cannot work says so


class TimeMajor(nn.Module):
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
    with pytest.raises(
        lf.LoraFuncError, match=r"'second' sees an input of shape .* not that of the 3 examples"
    ):
        adapter(model, lf.stack(population(params)), torch.randn(3, 4, 6))


def test_a_batch_of_another_size():
    model, adapter, params = adapted()
    with pytest.raises(
        lf.LoraFuncError,
        match=r"first axis is not that of the 2 examples .*: the batch has another size",
    ):
        adapter(model, lf.stack(population(params, 2)), text_batch(rows=3))


def test_an_input_without_an_example_axis():
    """One vector of as many entries as there are examples."""
    model = nn.Linear(6, 6)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(roles=()))
    with pytest.raises(
        lf.LoraFuncError,
        match=r"sees an input of shape \(6,\), whose first axis is not that of the 6 examples",
    ):
        adapter(model, lf.stack(population(params, 6)), torch.randn(6))


def test_shapes_that_are_no_example_axis():
    model, adapter, params = adapted()
    key, other = list(params)[:2]
    for leaf in (params[key][None, None], params[key][0], params[key].mT[None]):
        with pytest.raises(
            lf.LoraFuncError,
            match=r"where \(4, 32\) was expected, or \('n', 4, 32\) with an example axis",
        ):
            adapter(model, {**params, key: leaf}, text_batch())
    with pytest.raises(
        lf.LoraFuncError, match=r"the example axis of .* has length 2, and that of .* 3"
    ):
        adapter(
            model,
            {
                **params,
                key: params[key].expand(3, 4, 32),
                other: params[other].expand(2, 32 + 16, 4),
            },
            text_batch(),
        )


def test_one_adapter_is_merged_and_saved(tmp_path):
    model, adapter, params = adapted()
    stacked = lf.stack(population(params))
    for call in (
        functools.partial(lf.merge, adapter, model, stacked),
        functools.partial(lf.save, tmp_path / "a.safetensors", adapter, stacked),
    ):
        with pytest.raises(
            lf.LoraFuncError,
            match=r"it has an example axis. Take one adapter of it, as in lf.unstack",
        ):
            call()
    assert not list(tmp_path.iterdir())
    lf.merge(adapter, model, lf.unstack(stacked)[1])


# training


@over_variants
def test_a_population_trains_as_each_adapter_alone(variant):
    """K parameter groups with learning rates of their own, one pass for all: 20 steps end where K runs alone end."""
    model, adapter, params = adapted(variant)
    starts, rates = population(params), [1e-3, 3e-3, 1e-2]
    batches = [text_batch() for _ in range(4)]

    def fresh(p):
        return {key: leaf.clone().requires_grad_() for key, leaf in p.items()}

    together = [fresh(p) for p in starts]
    optimizer = torch.optim.AdamW(
        [{"params": list(p.values()), "lr": rate} for p, rate in zip(together, rates)]
    )
    for step in range(20):
        optimizer.zero_grad()
        losses(model, adapter, batches[step % 4])(lf.stack(together)).sum().backward()
        optimizer.step()
    for i, (start, rate) in enumerate(zip(starts, rates)):
        alone = fresh(start)
        optimizer = torch.optim.AdamW(list(alone.values()), lr=rate)
        for step in range(20):
            optimizer.zero_grad()
            losses(model, adapter, example(batches[step % 4], i))(alone).sum().backward()
            optimizer.step()
        moved = max((alone[key] - start[key]).abs().max().item() for key in alone)
        assert largest(together[i], alone) <= 1e-4 * max(
            leaf.abs().max().item() for leaf in alone.values()
        )
        assert moved > 5 * rate
