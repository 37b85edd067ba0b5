"""`prepare` runs once in a call, and in a bound view once for each change of its inputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from cases import catalogue, data_for
from models import adapted, checkpoint_activations, mlp, text_batch, tiny_llama, trained
from torch import nn
from torch.func import functional_call
from transformers import AlbertConfig, AlbertModel

import lora_func as lf
from lora_func.engine.layer import AdaptedLayer

Q_V = lf.Targets(names=(r"(q|v)_proj$",))
ALL = lf.Targets(roles=())
over_variants = pytest.mark.parametrize("variant", catalogue().values(), ids=catalogue().keys())
COUNTS: list[torch.dtype] = []  # dtypes for which `Counting` was prepared


@dataclass(frozen=True, kw_only=True)
class Counting(lf.DoRA):
    """DoRA that counts how often it is prepared."""

    def prepare(self, weight, params, dtype):
        COUNTS.append(dtype)
        return super().prepare(weight, params, dtype)


@pytest.fixture(autouse=True)
def counts():
    COUNTS.clear()
    return COUNTS


def leaves_of(params):
    return {key: leaf.clone().requires_grad_() for key, leaf in params.items()}


def test_once_for_each_layer_of_a_call(counts):
    model, adapter, params = adapted(Counting(r=2))
    adapter(model, params, text_batch())
    assert len(counts) == len(adapter.targets) == 4


def test_once_under_autocast(counts):
    """In float32, which serves inputs of either dtype: the cast to theirs comes last."""
    model, adapter, params = adapted(Counting(r=2), tiny_llama().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        adapter(model, params, text_batch())
    assert counts == [torch.float32] * len(adapter.targets)


def test_once_for_a_block_that_is_used_many_times(counts):
    """ALBERT runs one layer twelve times."""
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model, adapter, params = adapted(
        Counting(r=2), AlbertModel(config).eval(), targets=lf.Targets()
    )
    adapter(model, params, text_batch()["input_ids"])
    assert len(counts) == len(adapter.targets)


def test_checkpointing_repeats_none_of_it(counts):
    model, adapter, params = adapted(Counting(r=2))
    model.train()
    checkpoint_activations(model, use_reentrant=False)
    leaves = leaves_of(params)
    adapter(model, leaves, text_batch()).loss.backward()
    assert len(counts) == len(adapter.targets)
    assert all(leaf.grad is not None for leaf in leaves.values())


def test_a_decoded_token_pays_for_nothing_twice(counts):
    """`generate` prepares each layer once, for the dtype of the model."""
    model, adapter, params = adapted(Counting(r=2), tiny_llama().bfloat16())
    prompt = {"input_ids": text_batch()["input_ids"], "do_sample": False, "max_new_tokens": 8}
    bound = lf.bind(adapter, model, params)
    tokens = bound.generate(**prompt)
    assert counts == [torch.bfloat16] * len(adapter.targets)
    assert torch.equal(bound.generate(**prompt), tokens)
    assert len(counts) == len(adapter.targets)


@torch.no_grad()
def test_leaves_that_require_grad_are_never_kept(counts):
    """Optimizers and averages write to them through `.data`, which torch counts as no change."""
    model, adapter, params = adapted(Counting(r=2), mlp(), targets=ALL)
    leaves, x = leaves_of(params), torch.randn(3, 6)
    bound = lf.bind(adapter, model, leaves)
    before = bound(x)
    for leaf in leaves.values():
        leaf.data.add_(0.1)
    assert torch.equal(bound(x), adapter(model, leaves, x))
    assert not torch.equal(bound(x), before)
    # A view of the same leaves that is for inference follows the steps of an optimizer.
    bound = lf.bind(adapter, model, {key: leaf.detach() for key, leaf in leaves.items()})
    counts.clear()
    assert torch.equal(bound(x), bound(x))
    assert len(counts) == len(adapter.targets)
    for leaf in leaves.values():
        leaf.grad = torch.ones_like(leaf)
    torch.optim.SGD(leaves.values(), lr=0.1).step()
    assert torch.equal(bound(x), adapter(model, leaves, x))


@torch.no_grad()
def test_a_write_through_data_is_noticed_after_eval():
    """As an average of the weights may write between two evaluations."""
    model, adapter, params = adapted(lf.DoRA(r=2))
    leaves, batch = leaves_of(params), text_batch()
    bound = lf.bind(adapter, model, leaves)
    bound(**batch)
    for leaf in leaves.values():
        leaf.data.add_(0.1)
    assert torch.equal(bound.eval()(**batch).logits, adapter(model, leaves, batch).logits)


def test_a_bound_view_in_training_prepares_for_each_step(counts):
    model, adapter, params = adapted(Counting(r=2))
    leaves = leaves_of(params)
    bound = lf.bind(adapter, model, leaves)
    for _ in range(3):
        bound(**text_batch()).loss.backward()
    assert len(counts) == 3 * len(adapter.targets)


CHANGES = {
    "a step of an optimizer": lambda layer, leaf: leaf.add_(0.1),
    "data of a leaf": lambda layer, leaf: setattr(leaf, "data", leaf + 0.1),
    "the weight": lambda layer, leaf: layer.weight.add_(0.1),
    "the bias": lambda layer, leaf: layer.bias.add_(0.1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize(
    "variant", [lf.DoRA(r=2), lf.AntiPaSTO(r=2), lf.HRA(r=2)], ids=lambda v: v.name()
)
@pytest.mark.filterwarnings("ignore:the weight of '0' is not the one on which the adapter was made")
@torch.no_grad()
def test_a_bound_view_follows_every_change(variant, change):
    model, adapter, params = adapted(variant, mlp().requires_grad_(False), targets=ALL)
    bound, x = lf.bind(adapter, model, params), torch.randn(3, 6)
    before = bound(x)
    change(model[0], next(iter(params.values())))
    assert torch.equal(bound(x), adapter(model, params, x))
    assert not torch.equal(bound(x), before)


@over_variants
def test_moved_and_cast_views(variant):
    """After `double()`, a view uses nothing that was prepared for float32."""
    model = tiny_llama()
    model, adapter, params = adapted(variant, model)
    batch = text_batch()
    with torch.no_grad():
        bound = lf.bind(adapter, model, params)
        bound(**batch)
        model.double()
        expected = adapter(model, params, batch).logits
        assert torch.equal(lf.bind(adapter, model, params)(**batch).logits, expected)


@torch.no_grad()
def test_other_parameters_through_functional_call():
    model, adapter, params = adapted(lf.DoRA(r=2), mlp(), targets=ALL)
    bound, x, others = lf.bind(adapter, model, params), torch.randn(3, 6), trained(params)
    expected = bound(x)
    assert torch.equal(functional_call(bound, others, (x,)), adapter(model, others, x))
    assert torch.equal(bound(x), expected)


@torch.no_grad()
def test_copies_keep_nothing_of_each_other():
    model, adapter, params = adapted(lf.DoRA(r=2), mlp(), targets=ALL)
    bound, x = lf.bind(adapter, model, params), torch.randn(3, 6)
    bound(x)
    twin = copy.deepcopy(bound)
    assert all(m._kept is None for m in twin.modules() if isinstance(m, AdaptedLayer))
    next(iter(params.values())).add_(0.1)
    assert torch.equal(bound(x), adapter(model, params, x))
    assert not torch.equal(bound(x), twin(x))


@over_variants
@torch.no_grad()
def test_what_is_kept_of_inference_mode(variant):
    """Tensors prepared in inference mode serve gradients outside of it."""
    model, adapter, params = adapted(variant)
    bound, batch = lf.bind(adapter, model, params), text_batch()
    with torch.inference_mode():
        inside = bound(**batch).logits
    with torch.enable_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = bound(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        logits.sum().backward()
    assert embeds.grad is not None
    assert torch.equal(logits, inside)


@over_variants
def test_an_example_axis_is_prepared_as_a_whole(variant):
    """Examples share what does not differ. Each gives the result of a loop, called and bound."""
    model, targets = tiny_llama(), Q_V
    adapter, params = lf.adapt(model, variant, targets=targets, **data_for(variant, model, targets))
    population, batch = lf.stack([trained(params) for _ in range(3)]), text_batch()
    with torch.no_grad():
        called = adapter(model, population, batch).logits
        bound = lf.bind(adapter, model, population)
        assert torch.equal(bound(**batch).logits, called)
        assert torch.equal(bound(**batch).logits, called)
        for k, own in enumerate(lf.unstack(population)):
            torch.testing.assert_close(called[k], adapter(model, own, batch).logits[k])
    layer = next(m for m in bound.modules() if isinstance(m, AdaptedLayer))
    _, own, _ = layer._kept.entries
    constants = {t.data_ptr() for t in layer._site.frozen.values()}
    assert own
    for name, t in layer._kept.entries.params.items():
        assert name in own or t.data_ptr() in constants or t.shape[0] != 3


@pytest.mark.parametrize("enabled", [True, False])
@over_variants
def test_autocast(variant, enabled):
    """A region that switches autocast computes the same bits, called and bound."""

    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return self.b(self.a(x))

    model, x = Region(), torch.randn(3, 8)
    adapter, params = lf.adapt(model, variant, targets=ALL, **data_for(variant, model, ALL))
    params = trained(params)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not enabled):
        out = adapter(model, params, x)
        assert torch.equal(lf.bind(adapter, model, params)(x), out)
