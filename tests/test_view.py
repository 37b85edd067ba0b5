"""The engine on real models: every transform, compiled, checkpointed, patched, from two threads; the model never changes."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref

import pytest
import torch
import torch._dynamo.testing
from accelerate.hooks import ModelHook, add_hook_to_module
from cases import catalogue, data_for
from models import (
    adapted,
    assert_at_base,
    checkpoint_activations,
    largest,
    mlp,
    state_of,
    text_batch,
    tiny_llama,
    trained,
)
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import lora_func as lf

variants = catalogue()
over_variants = pytest.mark.parametrize("variant", variants.values(), ids=variants.keys())
over_at_base = pytest.mark.parametrize(
    "variant", catalogue(at_base=True).values(), ids=catalogue(at_base=True).keys()
)


def loss_of(model, adapter, batch):
    return lambda params: adapter(model, params, batch).loss


@over_variants
def test_the_model_is_never_touched(variant, tmp_path):
    """Bytes, versions, gradients, flags and structure are the same after adapt, init, forward, backward, save, load, merge."""
    model = tiny_llama()
    before = state_of(model)
    model, adapter, params = adapted(variant, model)
    batch = text_batch()
    adapter.init(model, **data_for(variant, model, lf.Targets(names=adapter.targets)))
    grad(loss_of(model, adapter, batch))(params)
    leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
    loss_of(model, adapter, batch)(leaves).backward()
    assert all(leaf.grad is not None for leaf in leaves.values())
    lf.merge(adapter, model, params)
    bound = lf.bind(adapter, model, params)
    bound.train()
    bound.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2)
    lf.save(tmp_path / "a.safetensors", adapter, params)
    lf.load(tmp_path / "a.safetensors", model)
    assert state_of(model) == before


def test_state_of_notices():
    """The measure of the test above is not blind."""
    touches = [
        lambda model: model.lm_head.weight.data.add_(1),
        lambda model: model.train(),
        lambda model: model.requires_grad_(False),
        lambda model: model.model.layers[0].register_forward_hook(lambda *_: None),
        lambda model: setattr(model.model.layers[0].self_attn, "q_proj", nn.Identity()),
        lambda model: setattr(model.model, "flag", 1),
    ]
    for touch in touches:
        model = tiny_llama()
        before = state_of(model)
        touch(model)
        assert state_of(model) != before


@over_at_base
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_identity_at_init(variant, dtype):
    """The logits are those of the base model: to the bit, or within the variant's rounding."""
    model, batch = tiny_llama().to(dtype), text_batch()
    targets = lf.Targets(names=(r"q_proj$", r"v_proj$", r"down_proj$"))
    adapter, params = lf.adapt(model, variant, targets=targets, **data_for(variant, model, targets))
    expected, logits = model(**batch).logits, adapter(model, params, batch).logits
    assert_at_base(variant, logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@over_at_base
def test_identity_at_init_in_any_dtype_of_the_parameters(variant, dtype):
    model, batch = tiny_llama(), text_batch()
    targets = lf.Targets(names=(r"q_proj$", r"v_proj$"))
    adapter, params = lf.adapt(
        model, variant, targets=targets, dtype=dtype, **data_for(variant, model, targets)
    )
    assert {leaf.dtype for leaf in params.values()} == {dtype}
    expected, logits = model(**batch).logits, adapter(model, params, batch).logits
    assert_at_base(variant, logits, expected)


@over_variants
def test_gradients_are_those_of_the_merged_weights(variant):
    """Autograd through `merge` and the plain model is the oracle, in float64; DoRA's detached norms are a constant in both."""
    model = tiny_llama().double()
    model, adapter, params = adapted(variant, model, dtype=torch.float64)
    batch = text_batch()
    given = grad(loss_of(model, adapter, batch))(params)
    expected = grad(lambda p: functional_call(model, lf.merge(adapter, model, p), (), batch).loss)(
        params
    )
    assert largest(given, expected) <= 1e-9 * max(leaf.abs().max() for leaf in expected.values())


@over_variants
def test_equals_functional_call(variant):
    """The view that carries its parameters computes what functional_call threads through a view of other parameters."""
    model, adapter, params = adapted(variant)
    batch = text_batch()
    view = lf.bind(adapter, model, trained(params))
    assert torch.equal(
        functional_call(view, params, (), batch).logits, adapter(model, params, batch).logits
    )
    given = grad(lambda p: functional_call(view, p, (), batch).loss)(params)
    assert largest(given, grad(loss_of(model, adapter, batch))(params)) == 0


@over_variants
def test_transforms(variant):
    """grad, vmap over parameters, vmap of grad over examples, jvp, HVP: each against the loop or against plain autograd."""
    model, adapter, params = adapted(variant, tiny_llama(attn_implementation="eager"))
    batch = text_batch()
    f = loss_of(model, adapter, batch)

    leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
    plain = torch.autograd.grad(f(leaves), list(leaves.values()))
    g = grad(f)(params)
    assert_near(g, dict(zip(params, plain)))

    several = [trained(params) for _ in range(3)]
    stacked = {key: torch.stack([p[key] for p in several]) for key in params}
    torch.testing.assert_close(vmap(f)(stacked), torch.stack([f(p) for p in several]))

    def example_loss(p, ids, mask, labels):
        batch = {"input_ids": ids[None], "attention_mask": mask[None], "labels": labels[None]}
        return adapter(model, p, batch).loss

    per_sample = vmap(grad(example_loss), in_dims=(None, 0, 0, 0))(params, *batch.values())
    for row in range(3):
        assert_near(
            {key: leaf[row] for key, leaf in per_sample.items()},
            grad(example_loss)(params, *(t[row] for t in batch.values())),
        )

    direction = {key: torch.randn_like(leaf) for key, leaf in params.items()}
    _, slope = jvp(f, (params,), (direction,))
    torch.testing.assert_close(
        slope, sum((g[key] * direction[key]).sum() for key in params), rtol=1e-4, atol=1e-5
    )

    if variant.exact_gradient:  # otherwise it is no gradient field
        _, forward_over_reverse = jvp(grad(f), (params,), (direction,))
        reverse_over_reverse = grad(
            lambda p: sum((leaf * direction[key]).sum() for key, leaf in grad(f)(p).items())
        )(params)
        assert_near(forward_over_reverse, reverse_over_reverse)


def assert_near(given, expected, tolerance: float = 1e-4) -> None:
    """In float32, in which a transformer's sums run in another order under each transform."""
    assert largest(given, expected) <= tolerance * max(
        leaf.abs().max().item() for leaf in expected.values()
    )


def test_hessian():
    model, adapter, params = adapted(
        lf.IA3(), mlp().double(), targets=lf.Targets(layers=[0]), dtype=torch.float64
    )
    x = torch.randn(5, 6, dtype=torch.float64)
    f = lambda p: adapter(model, p, x).square().sum()  # noqa: E731
    (key,) = params
    H = hessian(f)(params)[key][key]
    torch.testing.assert_close(
        H, torch.autograd.functional.hessian(lambda leaf: f({key: leaf}), params[key])
    )


@over_variants
def test_compile(variant):
    """One frame for the forward and one for its gradient, without a graph break, and none more for other parameters."""
    torch._dynamo.reset()
    model, adapter, params = adapted(variant)
    batch, other = text_batch(), trained(params)
    f = loss_of(model, adapter, batch)
    for function in (f, grad(f)):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        for p in (params, other):
            torch.testing.assert_close(compiled(p), function(p))
        assert counter.frame_count == 1


def test_compile_follows_the_model():
    """A compiled call guards on the model: switched to train mode, it is traced again and drops out."""
    torch._dynamo.reset()
    model, adapter, params = adapted(model=tiny_llama(attention_dropout=0.5))
    f = loss_of(model, adapter, text_batch())
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    assert compiled(params) == compiled(params) == f(params)
    model.train()
    assert compiled(params) != compiled(params)
    model.eval()
    assert compiled(params) == f(params)
    assert counter.frame_count == 2


def test_compile_with_inductor():
    torch._dynamo.reset()
    model, adapter, params = adapted()
    g = grad(loss_of(model, adapter, text_batch()))
    compiled = torch.compile(g, fullgraph=True)
    assert largest(compiled(params), g(params)) <= 1e-6


def test_train_and_eval_after_adapt():
    model, adapter, params = adapted(model=tiny_llama(attention_dropout=0.5))
    batch = text_batch()
    f = loss_of(model, adapter, batch)
    assert f(params) == f(params)
    model.train()
    assert f(params) != f(params)
    model.eval()
    assert f(params) == f(params)


def test_moved_and_retied_after_adapt():
    model, adapter, params = adapted()
    batch = text_batch()
    model.double()
    assert adapter(model, params, batch).logits.dtype == torch.float64
    model.lm_head.weight = model.model.embed_tokens.weight
    expected = functional_call(model, lf.merge(adapter, model, params), (), batch).logits
    torch.testing.assert_close(adapter(model, params, batch).logits, expected, rtol=1e-6, atol=1e-6)


# activation checkpointing


@over_variants
@pytest.mark.parametrize("bound", [False, True], ids=["call", "bound"])
def test_checkpointing_is_exact(variant, bound):
    """Non-reentrant: the gradients are those without it, to the bit, also when it is switched on after adapt."""
    model, adapter, params = adapted(variant)
    model.train()
    batch = text_batch()

    def gradients():
        leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
        loss = (
            lf.bind(adapter, model, leaves)(**batch) if bound else adapter(model, leaves, batch)
        ).loss
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))

    without = gradients()
    checkpoint_activations(model, use_reentrant=False)
    calls = count_calls(model.model.layers[0].input_layernorm)
    assert largest(gradients(), without) == 0
    assert len(calls) == 2  # the layer was recomputed
    _, grads = lf.value_and_grad(lambda p: adapter(model, p, batch).loss)(params)
    assert largest(grads, without) == 0


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad=True"
)  # torch's own, before it calls the layers
def test_reentrant_checkpointing_is_refused():
    """It would return None for every gradient without a word."""
    model, adapter, params = adapted()
    model.train()
    checkpoint_activations(model, use_reentrant=True)
    leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
    with pytest.raises(
        lf.LoraFuncError,
        match=r"gradients are switched off .*'model.layers.0.self_attn.q_proj'.*use_reentrant=False",
    ):
        adapter(model, leaves, text_batch())
    with torch.no_grad():
        adapter(model, leaves, text_batch())  # nobody asks for gradients


def test_checkpointing_inside_a_transform_says_what_to_do():
    model, adapter, params = adapted()
    model.train()
    checkpoint_activations(model, use_reentrant=False)
    model.disable_input_require_grads()  # transformers' hook calls requires_grad_() on a tensor of the transform
    with pytest.raises(
        lf.LoraFuncError, match=r"cannot run through activation checkpointing.*lf.value_and_grad"
    ):
        grad(loss_of(model, adapter, text_batch()))(params)


def count_calls(module: nn.Module) -> list:
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# runtimes


@over_variants
def test_generate_on_a_bound_view(variant):
    """Token for token what the merged model generates."""
    model, adapter, params = adapted(variant)
    batch = {key: value for key, value in text_batch(pad="left").items() if key != "labels"}
    merged = copy.deepcopy(model)
    merged.load_state_dict(lf.merge(adapter, model, params), strict=False)
    bound = lf.bind(adapter, model, params)
    assert type(bound) is type(model)
    options = {"max_new_tokens": 12, "do_sample": False}
    tokens = bound.generate(**batch, **options)
    assert torch.equal(tokens, merged.generate(**batch, **options))
    assert not torch.equal(bound(**batch).logits, model(**batch).logits)


def test_a_bound_view_keeps_its_own_mode():
    model, adapter, params = adapted(model=tiny_llama(attention_dropout=0.5))
    bound = lf.bind(adapter, model, params)
    bound.train()
    assert not any(module.training for module in model.modules())
    assert bound(**text_batch()).loss != bound(**text_batch()).loss


@pytest.mark.parametrize(
    "where",
    ["model.layers.0.self_attn", "model.layers.0", "model", "model.layers.0.self_attn.q_proj", ""],
)
def test_forward_patched_by_accelerate(where):
    """accelerate's hooks bind the original module in `forward`; kept so, the adapters below would be inert without a word."""
    seen = []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    model, adapter, params = adapted()
    batch = text_batch()
    expected = adapter(model, params, batch).logits
    add_hook_to_module(model.get_submodule(where), Hook())
    assert torch.equal(adapter(model, params, batch).logits, expected)
    assert torch.equal(lf.bind(adapter, model, params)(**batch).logits, expected)
    assert len(seen) == 2
    assert not torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_target_with_a_forward_of_its_own(frozen):
    """What a layer says of itself means the layer, and not what stands for it in the view."""
    model, adapter, params = adapted(
        model=mlp().requires_grad_(not frozen), targets=lf.Targets(roles=())
    )
    layer, x = model[2], torch.randn(3, 6)
    expected = adapter(model, params, x)
    layer.forward = functools.partial(lambda module, x: type(module).forward(module, x), layer)
    assert torch.equal(adapter(model, params, x), expected)


def test_modules_in_plain_attributes():
    """Lists, dicts, methods and partials that refer to modules of the model refer to their copies in the view."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
            self.in_list = [self.a]
            self.in_dict = {"b": self.b}
            self.as_partial = functools.partial(Net.run, self.c)
            self.as_method = self.through_d

        @staticmethod
        def run(layer, x):
            return layer(x)

        def through_d(self, x):
            return self.d(x)

        def forward(self, x):
            return self.as_method(self.as_partial(self.in_dict["b"](self.in_list[0](x))))

    model, x = Net(), torch.randn(3, 4)
    model, adapter, params = adapted(model=model, targets=lf.Targets())
    assert adapter.targets == ("a", "b", "c", "d")
    expected = functional_call(
        model, lf.merge(adapter, model, params), x
    )  # swaps the weights inside the layers themselves
    torch.testing.assert_close(adapter(model, params, x), expected)


def test_a_module_that_stands_twice():
    """Adapted once, in both places."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Sequential(shared))
    model, adapter, params = adapted(model=model, targets=lf.Targets())
    assert adapter.targets == ("0",)
    x = torch.randn(3, 4)
    merged = lf.merge(adapter, model, params)
    layer = lambda x: nn.functional.linear(x, merged["0.weight"], shared.bias)  # noqa: E731
    torch.testing.assert_close(adapter(model, params, x), layer(layer(torch.tanh(layer(x)))))


def test_a_linear_layer_alone():
    model = nn.Linear(4, 3)
    model, adapter, params = adapted(model=model, targets=lf.Targets())
    assert adapter.targets == ("",)
    assert set(params) == {"lora_A", "lora_B"}
    x = torch.randn(2, 4)
    merged = lf.merge(adapter, model, params)
    torch.testing.assert_close(adapter(model, params, x), functional_call(model, merged, x))


def test_attributes_of_the_layer_are_reached_through_the_view():
    """T5, for one, reads `self.wo.weight.dtype` before it calls the layer."""
    model, adapter, params = adapted()
    layer = lf.bind(adapter, model, params).model.layers[0].self_attn.q_proj
    original = model.model.layers[0].self_attn.q_proj
    assert layer.in_features == original.in_features
    assert layer.weight.data_ptr() == original.weight.data_ptr()
    with pytest.raises(AttributeError, match="nope"):
        _ = layer.nope


def test_base_parameters_get_no_gradient():
    """Whether or not the user froze them; the batch does."""
    model, adapter, params = adapted(model=mlp(), targets=lf.Targets())
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    x = torch.randn(3, 6, requires_grad=True)
    adapter(model, leaves, x).sum().backward()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert x.grad is not None


def test_recurrent_layers_are_frozen_too():
    """nn.LSTM keeps its parameters a second time in a list."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    model, adapter, params = adapted(model=Net(), targets=lf.Targets())
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    adapter(model, leaves, torch.randn(2, 3, 4)).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_two_threads_at_once():
    """Two adapters on one base give what they give one after the other."""
    model, adapter, params = adapted()
    other, others = lf.adapt(model, lf.IA3(), targets=lf.Targets(names=(r"k_proj$", r"v_proj$")))
    work = [(adapter, params, text_batch()), (other, trained(others), text_batch())]
    expected = [grad(loss_of(model, a, batch))(p) for a, p, batch in work]
    results: list[list] = [[], []]

    def run(index: int) -> None:
        a, p, batch = work[index]
        for _ in range(20):
            results[index].append(grad(loss_of(model, a, batch))(p))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for index in range(2):
        assert len(results[index]) == 20
        assert all(largest(result, expected[index]) == 0 for result in results[index])


def test_a_call_leaves_nothing_for_the_garbage_collector():
    """A reference cycle in a view would keep parameters, and the graph behind them, until some later collection."""
    model, adapter, params = adapted()
    batch = text_batch()
    gc.collect()
    gc.disable()
    try:
        leaf = weakref.ref(next(iter(params.values())))
        adapter(model, params, batch)
        del params
        assert leaf() is None
    finally:
        gc.enable()


def test_the_adapter_keeps_no_model_alive():
    model, adapter, params = adapted()
    adapter(model, params, text_batch())
    lf.bind(adapter, model, params)
    alive = weakref.ref(model)
    weight = weakref.ref(model.model.layers[0].self_attn.q_proj.weight)
    del model
    gc.collect()
    assert alive() is None
    assert weight() is None


def test_recorded_outputs_leave_no_hooks():
    """transformers registers its recording hooks in the middle of a forward, at the first call that asks for their outputs."""
    batch = {**text_batch(), "output_hidden_states": True, "output_attentions": True}
    model = tiny_llama().requires_grad_(False)  # else the view copies all that has parameters
    model.set_attn_implementation("eager")
    before = state_of(model)
    adapter, params = lf.adapt(
        model, lf.LoRA(r=2), targets=lf.Targets(layers=[0])
    )  # layer 1 has no adapter
    bound = lf.bind(adapter, model, params)
    for run in (lambda: adapter(model, params, batch), lambda: bound(**batch)) * 2:
        out = run()
        assert len(out.hidden_states) == 3
        assert len(out.attentions) == 2
    assert state_of(model) == before
    assert (
        len(model(**batch).hidden_states) == 3
    )  # now they are on the model, and a view takes them along
    assert len(adapter(model, params, batch).hidden_states) == 3


def test_hooks_on_a_bound_view_stay_there():
    model, adapter, params = adapted()
    bound, calls = lf.bind(adapter, model, params), []
    bound.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    bound.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(2))
    model(**text_batch())
    assert calls == []
    bound(**text_batch())
    assert calls == [2, 1]


class CallsByReference(nn.Module):
    """Keeps the bound method of a child, as code that avoids `__call__` does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.project = self.linear.forward

    def forward(self, x):
        return self.project(x)


def test_a_bound_method_of_an_adapted_layer():
    """Bound to what stands for the layer, the method is that one's own: the layer's would leave the adapter inert."""
    model, x = CallsByReference(), torch.randn(3, 4)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(roles=()))
    params = trained(params)
    expected = functional_call(
        model.linear, {"weight": lf.merge(adapter, model, params)["linear.weight"]}, (x,)
    )
    torch.testing.assert_close(adapter(model, params, x), expected)
