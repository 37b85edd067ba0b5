"""The engine on real models: transforms, compiled, checkpointed, patched, in two threads."""

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

variants, at_base = catalogue(), catalogue(at_base=True)
over_variants = pytest.mark.parametrize("variant", variants.values(), ids=variants.keys())
over_at_base = pytest.mark.parametrize("variant", at_base.values(), ids=at_base.keys())


def loss_of(model, adapter, batch):
    return lambda params: adapter(model, params, batch).loss


@over_variants
def test_the_model_is_never_touched(variant, tmp_path):
    """Its bytes, versions, gradients, flags and structure survive every use of an adapter."""
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
    """`state_of` changes with everything that the test above is about."""
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
    """Autograd through `merge` and the plain model is the oracle, in float64.

    Both treat DoRA's detached norms as constants.
    """
    model = tiny_llama().double()
    model, adapter, params = adapted(variant, model, dtype=torch.float64)
    batch = text_batch()

    def oracle(p):
        return functional_call(model, lf.merge(adapter, model, p), (), batch).loss

    given, expected = grad(loss_of(model, adapter, batch))(params), grad(oracle)(params)
    assert_near(given, expected, 1e-9)


@over_variants
def test_equals_functional_call(variant):
    """A call equals functional_call on a bound view of other parameters.

    What all layers share is a parameter of each of them; functional_call ties them together.
    """
    model, adapter, params = adapted(variant)
    batch, others = text_batch(), trained(params)
    view = lf.bind(adapter, model, others)
    path_of = {id(leaf): path for path, leaf in view.named_parameters()}

    def call(p):
        named = {path_of[id(others[key])]: leaf for key, leaf in p.items()}
        return functional_call(view, named, (), batch)

    assert torch.equal(call(params).logits, adapter(model, params, batch).logits)
    given = grad(lambda p: call(p).loss)(params)
    # To rounding: in a transform a bound view prepares layer by layer, and a call together.
    assert largest(given, grad(loss_of(model, adapter, batch))(params)) <= 1e-6


@over_variants
def test_transforms(variant):
    """grad, vmap over parameters, vmap of grad over examples, jvp and Hessian-vector products.

    The oracles are a loop and plain autograd.
    """
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
        alone = grad(example_loss)(params, *(t[row] for t in batch.values()))
        assert_near({key: leaf[row] for key, leaf in per_sample.items()}, alone)

    direction = {key: torch.randn_like(leaf) for key, leaf in params.items()}

    def along(gradient):
        return sum((gradient[key] * direction[key]).sum() for key in params)

    slope = jvp(f, (params,), (direction,))[1]
    torch.testing.assert_close(slope, along(g), rtol=1e-4, atol=1e-5)

    if variant.exact_gradient:  # otherwise the gradient is that of no function
        forward_over_reverse = jvp(grad(f), (params,), (direction,))[1]
        reverse_over_reverse = grad(lambda p: along(grad(f)(p)))(params)
        assert_near(forward_over_reverse, reverse_over_reverse)


def assert_near(given, expected, tolerance: float = 1e-4) -> None:
    """By default for float32: each transform runs a transformer's sums in another order."""
    scale = max(leaf.abs().max().item() for leaf in expected.values())
    assert largest(given, expected) <= tolerance * scale


def test_hessian():
    options = {"targets": lf.Targets(layers=[0]), "dtype": torch.float64}
    model, adapter, params = adapted(lf.IA3(), mlp().double(), **options)
    x = torch.randn(5, 6, dtype=torch.float64)

    def f(p):
        return adapter(model, p, x).square().sum()

    ((key, leaf),) = params.items()
    expected = torch.autograd.functional.hessian(lambda d: f({key: d}), leaf)
    torch.testing.assert_close(hessian(f)(params)[key][key], expected)


@over_variants
def test_compile(variant):
    """One graph for the forward and one for its gradient, without a break.

    Other parameters cause no second one.
    """
    torch._dynamo.reset()
    model, adapter, params = adapted(variant, model=tiny_llama(num_hidden_layers=1))
    batch, other = text_batch(), trained(params)
    f = loss_of(model, adapter, batch)
    for function in (f, grad(f)):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        for p in (params, other):
            torch.testing.assert_close(compiled(p), function(p))
        assert counter.frame_count == 1


def test_compile_follows_the_model():
    """A compiled call guards on the model: in train mode it is traced again, and drops out."""
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
    """Non-reentrant checkpointing, switched on after `adapt`, changes no gradient by a bit."""
    model, adapter, params = adapted(variant)
    model.train()
    batch = text_batch()

    def gradients():
        leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
        view = lf.bind(adapter, model, leaves)
        out = view(**batch) if bound else adapter(model, leaves, batch)
        return dict(zip(leaves, torch.autograd.grad(out.loss, list(leaves.values()))))

    without = gradients()
    checkpoint_activations(model, use_reentrant=False)
    calls = count_calls(model.model.layers[0].input_layernorm)
    assert largest(gradients(), without) == 0
    assert len(calls) == 2  # the layer was recomputed
    _, grads = lf.value_and_grad(lambda p: adapter(model, p, batch).loss)(params)
    assert largest(grads, without) == 0


# torch warns so before it calls the layers.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_is_refused():
    """It would silently return None for every gradient."""
    model, adapter, params = adapted()
    model.train()
    checkpoint_activations(model, use_reentrant=True)
    leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
    message = r"gradients are switched off .*'model.layers.0.self_attn.q_proj'.*use_reentrant=False"
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter(model, leaves, text_batch())
    with torch.no_grad():
        adapter(model, leaves, text_batch())  # nobody asks for gradients


def test_checkpointing_inside_a_transform_is_refused():
    model, adapter, params = adapted()
    model.train()
    checkpoint_activations(model, use_reentrant=False)
    # transformers' hook would call requires_grad_() on a tensor of the transform, and fail first.
    model.disable_input_require_grads()
    message = "cannot run through activation checkpointing.*lf.value_and_grad"
    with pytest.raises(lf.LoraFuncError, match=message):
        grad(loss_of(model, adapter, text_batch()))(params)


def count_calls(module: nn.Module) -> list:
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# runtimes


@over_variants
def test_generate_on_a_bound_view(variant):
    """It generates the tokens that the merged model generates."""
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
    """accelerate's hook binds the original module in `forward`. The view rebinds it to the copy.

    Otherwise the adapters below would silently be inert.
    """
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
    """A layer's own attributes refer to the bare layer, and not to the wrapper in the view."""
    model, adapter, params = adapted(
        model=mlp().requires_grad_(not frozen), targets=lf.Targets(roles=())
    )
    layer, x = model[2], torch.randn(3, 6)
    expected = adapter(model, params, x)
    layer.forward = functools.partial(lambda module, x: type(module).forward(module, x), layer)
    assert torch.equal(adapter(model, params, x), expected)


def test_modules_in_plain_attributes():
    """Lists, dicts, methods and partials that refer to modules refer to their copies in a view."""

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
    merged = lf.merge(adapter, model, params)
    expected = functional_call(model, merged, x)  # it swaps weights inside the layers themselves
    torch.testing.assert_close(adapter(model, params, x), expected)


def test_a_module_that_stands_twice():
    """It has one adapter in all places."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Sequential(shared))
    model, adapter, params = adapted(model=model, targets=lf.Targets())
    assert adapter.targets == ("0",)
    x = torch.randn(3, 4)
    merged = lf.merge(adapter, model, params)

    def layer(x):
        return nn.functional.linear(x, merged["0.weight"], shared.bias)

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
    """They get none even if the user did not freeze them. The batch gets one."""
    model, adapter, params = adapted(model=mlp(), targets=lf.Targets())
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    x = torch.randn(3, 6, requires_grad=True)
    adapter(model, leaves, x).sum().backward()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert x.grad is not None


def test_recurrent_layers_are_frozen_too():
    """nn.LSTM also keeps its parameters in a list, which must hold the frozen ones."""

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
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(results[index]) == 20
        assert all(largest(result, expected[index]) == 0 for result in results[index])


def test_a_call_leaves_nothing_for_the_garbage_collector():
    """A reference cycle in a view would keep parameters, and their graph, until a collection."""
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
    """transformers registers its recording hooks during the first forward that asks for outputs.

    In a view it registers them on copies.
    """
    batch = {**text_batch(), "output_hidden_states": True, "output_attentions": True}
    model = tiny_llama().requires_grad_(False)  # else the view copies all that has parameters
    model.set_attn_implementation("eager")
    before = state_of(model)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(layers=[0]))  # not layer 1
    bound = lf.bind(adapter, model, params)
    for run in (lambda: adapter(model, params, batch), lambda: bound(**batch)) * 2:
        out = run()
        assert len(out.hidden_states) == 3
        assert len(out.attentions) == 2
    assert state_of(model) == before
    # A call of the model puts them on the model, and a view inherits them.
    assert len(model(**batch).hidden_states) == 3
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
    """In a view, the method is that of the wrapper; the layer's own would skip the adapter."""
    model, x = CallsByReference(), torch.randn(3, 4)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(roles=()))
    params = trained(params)
    merged = lf.merge(adapter, model, params)
    expected = functional_call(model.linear, {"weight": merged["linear.weight"]}, (x,))
    torch.testing.assert_close(adapter(model, params, x), expected)
