"""Odd modules and odd runtimes: each works exactly, or is refused by name.

None silently leaves an adapter inert.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import pickle
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from cases import catalogue, data_for
from models import (
    adapted,
    assert_at_base,
    largest,
    mlp,
    state_of,
    text_batch,
    tiny_llama,
    trained,
)
from torch import nn
from torch.func import functional_call, grad
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from transformers import AlbertConfig, AlbertModel

import lora_func as lf
from lora_func.weights.table import weight_of

VARIANTS = catalogue(2)
over_variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
Q_V = lf.Targets(names=(r"q_proj$", r"v_proj$"))
ALL = lf.Targets(roles=())


# layers that compute their weight

NORMS = {
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "old spectral_norm": spectral_norm,
    "old weight_norm": weight_norm,
    "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
}
over_norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
READING = ("pissa", "dora", "dora-full", "delora-paper", "antipasto", "hira")  # the weight
old = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def normed(norm, requires_grad: bool = True) -> nn.Sequential:
    """Two such layers. Their tensors moved since their last forward, as by `load_state_dict`."""
    model = nn.Sequential(norm(nn.Linear(6, 8)), nn.GELU(), norm(nn.Linear(8, 6)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(requires_grad)


def plain(model: nn.Sequential, norm) -> nn.Sequential:
    """The same map with ordinary layers, whose weights are those after a forward in eval mode."""
    twin = normed(norm, requires_grad=False).eval()
    twin.load_state_dict(model.state_dict())
    twin(torch.zeros(1, 6))
    result = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    for layer, computing in ((result[0], twin[0]), (result[2], twin[2])):
        layer.load_state_dict({"weight": computing.weight, "bias": computing.bias})
    return result


@old
@pytest.mark.parametrize("variant", [VARIANTS[name] for name in (*READING, "hra")], ids=str)
@over_norms
@pytest.mark.parametrize("requires_grad", [True, False], ids=["unfrozen", "frozen"])
def test_computed_weights(variant, norm, requires_grad, tmp_path):
    """Variants read the weight of the next forward. All results equal those on plain layers."""
    model = normed(norm, requires_grad).eval()
    before = state_of(model)
    other = plain(model, norm)
    adapter, params = lf.adapt(model, variant, targets=ALL, generator=seeded())
    reference, expected = lf.adapt(other, variant, targets=ALL, generator=seeded())
    torch.testing.assert_close(params, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(dict(adapter.frozen), dict(reference.frozen), rtol=0, atol=1e-6)
    params, x = trained(params), torch.randn(5, 6)
    merged = functional_call(other, lf.merge(adapter, other, params), x)
    torch.testing.assert_close(adapter(model, params, x), merged, rtol=1e-4, atol=1e-5)

    def loss(model):
        return lambda p: adapter(model, p, x).square().sum()

    given, wanted = grad(loss(model))(params), grad(loss(other))(params)
    assert largest(given, wanted) <= 1e-4 * max(leaf.abs().max().item() for leaf in given.values())
    leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
    grads = torch.autograd.grad(loss(model)(leaves), list(leaves.values()))
    assert largest(dict(zip(leaves, grads)), given) == 0
    lf.save(tmp_path / "a.safetensors", adapter, params)
    lf.load(tmp_path / "a.safetensors", model, check_base="error")
    assert state_of(model) == before


@old
@over_norms
def test_computed_weights_in_train_mode(norm, tmp_path):
    """A call computes what the next forward would, and moves no vector of spectral_norm."""
    model = normed(norm).train()
    before, x = state_of(model), torch.randn(5, 6)
    adapter, params = lf.adapt(model, lf.DoRA(r=2), targets=ALL)
    adapter.init(model)
    lf.save(tmp_path / "a.safetensors", adapter, params)
    lf.load(tmp_path / "a.safetensors", model, check_base="error")
    assert state_of(model) == before
    out = adapter(model, params, x)
    assert state_of(model) == before
    assert torch.equal(out, model(x))


@old
@over_norms
def test_computed_weights_are_not_merged(norm):
    """`load_state_dict(merged, strict=False)` would silently drop them."""
    model, adapter, params = adapted(model=normed(norm), targets=ALL)
    message = "'0' computes its weight from other tensors, .* First make it a plain layer"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.merge(adapter, model, params)


def test_a_parametrized_layer_that_no_adapter_sees():
    """The search for targets reads no weight of a convolution or an embedding."""
    convolution = parametrizations.spectral_norm(nn.Conv1d(3, 3, 1))
    embedding = parametrizations.spectral_norm(nn.Embedding(4, 4))
    model = nn.Sequential(convolution, nn.Linear(4, 4), embedding).train()
    before = state_of(model)
    adapter, _ = lf.adapt(model, lf.LoRA(r=2))
    assert adapter.targets == ("1",)
    assert state_of(model) == before


def test_cached_parametrizations():
    """torch caches them by the id of a module, and a later copy in a view may have the same id."""
    model, adapter, params = adapted(model=normed(parametrizations.weight_norm), targets=ALL)
    x = torch.randn(5, 6)
    expected = adapter(model, params, x)
    message = r"Leave cached\(\), or freeze the model"
    with parametrize.cached(), pytest.raises(lf.LoraFuncError, match=message):
        adapter(model, params, x)
    model.requires_grad_(False)
    with parametrize.cached():
        assert torch.equal(adapter(model, params, x), expected)
        assert torch.equal(adapter(model, params, x), expected)


# shared layers and weights


def test_a_tied_head():
    """The head is adapted, and the embedding that holds the same parameter is not."""
    model = tiny_llama(tie_word_embeddings=True)
    head = lf.Targets(names=("lm_head",), exclude=())
    model, adapter, params = adapted(lf.DoRA(r=2), model, targets=head)
    ids = text_batch()["input_ids"]
    hidden = model.model(ids).last_hidden_state
    own = adapter.params_of("lm_head", params)
    W, b = adapter.variants["lm_head"].merged(weight_of(model.lm_head), own)
    logits = adapter(model, params, {"input_ids": ids}).logits
    torch.testing.assert_close(logits, F.linear(hidden, W, b))


def test_two_layers_with_one_weight():
    """Each has an adapter of its own. Both read the weight, and neither changes it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    before = state_of(model)
    model, adapter, params = adapted(lf.PiSSA(r=2), model, targets=ALL)
    assert adapter.targets == ("0", "2")
    apart = copy.deepcopy(model)
    apart[2].weight = nn.Parameter(model[2].weight.detach().clone())
    x = torch.randn(3, 4)
    expected = functional_call(apart, lf.merge(adapter, apart, params), x)
    torch.testing.assert_close(adapter(model, params, x), expected)
    assert state_of(model) == before


@pytest.mark.parametrize("variant", [lf.DoRA(r=2), lf.HRA(r=2)], ids=["dora", "hra"])
def test_a_block_that_is_used_twice(variant):
    """ALBERT runs one layer several times. It has one adapter, as in the merged model."""
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = AlbertModel(config).eval()
    model, adapter, params = adapted(variant, model, targets=lf.Targets(names=("query", "ffn")))
    ids = text_batch()["input_ids"]
    expected = functional_call(model, lf.merge(adapter, model, params), ids).last_hidden_state
    out = adapter(model, params, ids).last_hidden_state
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_second_path_is_refused_by_name():
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = nn.Sequential(block, block)
    message = r"'1.0' and '0.0' are one layer, which is adapted under the path '0.0'"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(names=(r"^1\.0",)))
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(model, {r"^1\.0": lf.LoRA(r=2)})


def test_no_linear_layer_at_all():
    message = "matches no layer of Sequential. The model has no linear layers"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(nn.Sequential(nn.LayerNorm(4), nn.GELU()), lf.LoRA())


@over_variants
def test_the_model_is_the_layer(variant):
    model, x = nn.Linear(6, 4), torch.randn(3, 6)
    adapter, params = lf.adapt(model, variant, **data_for(variant, model, ALL))
    params = trained(params)
    expected = functional_call(model, lf.merge(adapter, model, params), x)
    torch.testing.assert_close(adapter(model, params, x), expected, rtol=1e-4, atol=1e-5)
    assert lf.probe(adapter, model, params, x).inert == ()


# patched forwards


def by_method(module):
    def forward(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    module.forward = types.MethodType(forward, module)


def by_partial(module):
    module.forward = functools.partial(type(module).forward, module)


def by_closure(module):
    old = module.forward

    @functools.wraps(old)
    def forward(*args, **kwargs):
        return old(*args, **kwargs)

    module.forward = forward


def by_nested_closures(module):
    by_closure(module)
    by_closure(module)


def by_closure_over_the_module(module):
    module.forward = lambda *args, scale=1, **kwargs: type(module).forward(module, *args, **kwargs)


def by_recursive_closure(module):
    def forward(*args, again=True, **kwargs):
        return (
            forward(*args, again=False, **kwargs)
            if again and never
            else type(module).forward(module, *args, **kwargs)
        )

    never = False
    module.forward = forward


def by_compiling_forward(module):
    module.forward = torch.compile(module.forward, backend="eager")


def by_compiling_in_place(module):
    module.compile(backend="eager")


patches = [
    by_method,
    by_partial,
    by_closure,
    by_nested_closures,
    by_closure_over_the_module,
    by_recursive_closure,
    by_compiling_forward,
    by_compiling_in_place,
]


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "unfrozen"])
@pytest.mark.parametrize("where", ["", "model.layers.0", "model.layers.0.self_attn.q_proj"])
@pytest.mark.parametrize("patch", patches, ids=lambda patch: patch.__name__)
def test_a_forward_set_on_a_module(patch, where, frozen):
    """The view calls it with the copy: adapters below are alive, and the base gets no gradient."""
    model, adapter, params = adapted(model=tiny_llama().requires_grad_(not frozen))
    batch = text_batch()
    expected = adapter(model, params, batch).logits
    patch(model.get_submodule(where))
    before = state_of(model)
    leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
    out = adapter(model, leaves, batch)
    assert torch.equal(out.logits, expected)
    out.loss.backward()
    assert all(leaf.grad is not None for leaf in leaves.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(lf.bind(adapter, model, params)(**batch).logits, expected)
    assert state_of(model) == before


old_forward: Any = None  # the global of the next test


@pytest.mark.parametrize("where", ["", "model.layers.0"])
def test_a_forward_that_reaches_the_model_by_a_global_name(where, monkeypatch):
    """As in a notebook. It is refused, because no view can replace a global for one call."""
    model, adapter, params = adapted()
    module = model.get_submodule(where)
    monkeypatch.setitem(globals(), "old_forward", module.forward)

    def forward(*args, **kwargs):
        return old_forward(*args, **kwargs)

    module.forward = forward
    message = r"by the global name 'old_forward'.*types.MethodType\(forward, module\)"
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter(model, params, text_batch())


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "unfrozen"])
def test_a_model_that_no_view_can_reach(frozen):
    """A class attribute holds it: a call warns, and the probe finds every layer inert."""

    class Box:
        module: Any = None

    model, adapter, params = adapted(model=tiny_llama().requires_grad_(not frozen))
    Box.module = model
    model.forward = lambda *args, **kwargs: type(Box.module).forward(Box.module, *args, **kwargs)
    with pytest.warns(UserWarning, match="LlamaForCausalLM ran, but none of the adapted layers"):
        adapter(model, params, text_batch())
    found = lf.probe(adapter, model, params, text_batch())
    assert found.inert == adapter.targets
    assert found.dead == tuple(params)
    assert found.perturbation == 0


def test_a_model_that_torch_compile_returned():
    model, batch = tiny_llama(), text_batch()
    compiled: Any = torch.compile(model, backend="eager")
    adapter, params = lf.adapt(compiled, lf.LoRA(r=2), targets=Q_V)
    params = trained(params)
    inner, _ = lf.adapt(model, lf.LoRA(r=2), targets=Q_V)
    same = {key.removeprefix("_orig_mod."): leaf for key, leaf in params.items()}
    expected = inner(model, same, batch).logits
    assert torch.equal(adapter(compiled, params, batch).logits, expected)


def test_a_model_prepared_by_accelerate():
    """Mixed precision wraps `forward` in an autocast and in a cast of the outputs."""
    model, adapter, params = adapted()
    batch = text_batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = adapter(model, params, batch).logits.float()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert torch.equal(adapter(prepared, params, batch).logits, expected)


# modes and defaults of torch


@over_variants
def test_inference_mode(variant):
    """Parameters made in it are trainable outside, and a call in it gives the same bits."""
    model, batch = tiny_llama(), text_batch()
    data = data_for(variant, model, Q_V)
    with torch.inference_mode():
        adapter, params = lf.adapt(model, variant, targets=Q_V, **data)
        inside = adapter(model, params, batch).logits
        bound = lf.bind(adapter, model, params)
        assert torch.equal(bound(**batch).logits, inside)
        assert bound.generate(batch["input_ids"], max_new_tokens=1).shape == (3, 11)
        assert inside.is_inference()
        adapter, again = adapter.to(torch.float64).to(torch.float32), adapter.init(model, **data)
    assert torch.equal(adapter(model, params, batch).logits, inside)
    assert torch.equal(bound(**batch).logits, inside)
    for given in (params, again):
        leaves = {key: leaf.requires_grad_() for key, leaf in given.items()}
        adapter(model, leaves, batch).loss.backward()
        assert all(leaf.grad is not None for leaf in leaves.values())


def test_load_in_inference_mode(tmp_path):
    model, adapter, params = adapted(lf.DoRA(r=2))
    lf.save(tmp_path / "a.safetensors", adapter, params)
    with torch.inference_mode():
        adapter, params = lf.load(tmp_path / "a.safetensors", model)
    lf.value_and_grad(lambda p: adapter(model, p, text_batch()).loss)(params)
    assert not any(leaf.is_inference() for leaf in (*params.values(), *adapter.frozen.values()))


@over_variants
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
)
def test_trainable_leaves_where_gradients_are_off(variant, mode):
    model, adapter, params = adapted(variant)
    batch = text_batch()
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    expected = adapter(model, leaves, batch).logits
    bound = lf.bind(adapter, model, leaves)
    with mode():
        for out in (adapter(model, leaves, batch).logits, bound(**batch).logits):
            assert torch.equal(out, expected)
            assert not out.requires_grad
        plain = {key: leaf.detach() for key, leaf in leaves.items()}
        _, grads = lf.value_and_grad(lambda p: adapter(model, p, batch).loss)(plain)
    assert sum(leaf.abs().sum() for leaf in grads.values()) > 0


@over_variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(variant, dtype):
    model, batch = tiny_llama(), text_batch()
    options = {"targets": Q_V, **data_for(variant, model, Q_V)}
    adapter, params = lf.adapt(model, variant, generator=seeded(), **options)
    expected = adapter(model, params, batch).logits
    torch.set_default_dtype(dtype)
    try:
        other, drawn = lf.adapt(model, variant, generator=seeded(), **options)
        out = other(model, params, batch).logits
    finally:
        torch.set_default_dtype(torch.float32)
    for given, wanted in ((drawn, params), (other.frozen, adapter.frozen)):
        assert {key: leaf.dtype for key, leaf in given.items()} == {
            key: leaf.dtype for key, leaf in wanted.items()
        }
        assert all(torch.equal(given[key], leaf) for key, leaf in wanted.items())
    assert torch.equal(out, expected)


@over_variants
def test_a_default_device(variant):
    """A call makes no tensor on it. `adapt` refuses to draw parameters on another device."""
    model, x = mlp(), torch.randn(3, 6)
    data = data_for(variant, model, ALL)
    with torch.device("cpu"):
        adapter, params = lf.adapt(model, variant, targets=ALL, **data)
    params = trained(params)
    expected = adapter(model, params, x)
    with torch.device("meta"):
        assert torch.equal(adapter(model, params, x), expected)
        assert torch.equal(lf.bind(adapter, model, params)(x), expected)
    refused = ""
    with torch.device("meta"):
        try:
            _, drawn = lf.adapt(model, variant, targets=ALL, **data)
        except lf.LoraFuncError as error:
            drawn, refused = {}, str(error)
    # A variant that takes all its tensors from the weight or the data draws none.
    assert not any(leaf.is_meta for leaf in drawn.values())
    assert drawn or 'the layer is on cpu, and its parameters were drawn on "meta"' in refused


@over_variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(variant, dtype):
    """The output has the base's dtype and an error of its size. Autocast rounds nothing at init."""
    model, batch = tiny_llama(), text_batch()
    options = {"targets": Q_V, **data_for(variant, model, Q_V)}
    adapter, params = lf.adapt(model, variant, generator=seeded(), **options)

    def f(p):
        return adapter(model, p, batch).loss

    moved = trained(params)
    base, exact = model(**batch).logits, adapter(model, moved, batch).logits
    expected = grad(f)(moved)
    leaves = {key: leaf.clone().requires_grad_() for key, leaf in moved.items()}
    with torch.autocast("cpu", dtype):
        other, drawn = lf.adapt(model, variant, generator=seeded(), **options)
        low, out = model(**batch).logits, adapter(model, moved, batch).logits
        at_init = adapter(model, params, batch).logits
        given, loss = grad(f)(moved), f(leaves)
    backward = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    for new, known in ((drawn, params), (other.frozen, adapter.frozen)):
        assert all(torch.equal(new[key], leaf) for key, leaf in known.items())
    assert out.dtype == low.dtype
    if variant.card.at_init != "moved":
        # Autocast returns the layers' outputs in `dtype`, and the logits maybe in float32.
        assert_at_base(variant, at_init.to(dtype), low.to(dtype))
    eps = torch.finfo(dtype).eps
    of_base = max((low - base).abs().max(), eps * exact.abs().max())
    assert (out - exact).abs().max() <= 4 * of_base
    scale = max(leaf.abs().max().item() for leaf in expected.values())
    for grads in (given, backward):
        assert {leaf.dtype for leaf in grads.values()} == {torch.float32}
        assert all(leaf.isfinite().all() for leaf in grads.values())
        assert largest(grads, expected) <= 8 * eps * scale


def test_export():
    """A bound view of a frozen model exports like any model, with the parameters in its state."""
    model, adapter, params = adapted(lf.DoRA(r=2), tiny_llama().requires_grad_(False))
    batch = {"input_ids": text_batch()["input_ids"], "use_cache": False}
    program = torch.export.export(lf.bind(adapter, model, params), (), batch, strict=False)
    assert params.keys() <= program.state_dict.keys()
    # To a few units in the last place: traced code scales the update before it adds it.
    torch.testing.assert_close(
        program.module()(**batch).logits, adapter(model, params, batch).logits
    )


# other processes


@over_variants
@pytest.mark.parametrize(
    "twin",
    [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))],
    ids=["deepcopy", "pickle"],
)
def test_copies(variant, twin):
    """A copy of an Adapter, with its model or without, and of a bound view gives the same bits."""
    model, adapter, params = adapted(variant)
    batch = text_batch()
    expected = adapter(model, params, batch).logits
    assert torch.equal(twin(adapter)(model, params, batch).logits, expected)
    again, model_again, params_again = twin((adapter, model, params))
    assert torch.equal(again(model_again, params_again, batch).logits, expected)
    bound = twin(lf.bind(adapter, model, params))
    assert torch.equal(bound(**batch).logits, expected)


def test_a_spawned_process():
    """Each adapter computes the same bits in another process."""
    work = []
    for variant in VARIANTS.values():
        model, adapter, params = adapted(variant, mlp(), targets=ALL)
        work.append((adapter, model, params, torch.randn(3, 6)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        results = pool.starmap(lf.Adapter.__call__, work)
    for out, arguments in zip(results, work):
        assert torch.equal(out, lf.Adapter.__call__(*arguments))
