"""A bound module as code that knows only nn.Module sees it. Trainers have tests of their own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models import adapted, largest, mlp, state_of, text_batch, tiny_llama
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

import lora_func as lf

ALL = lf.Targets(roles=())


def bound(variant: lf.Variant | None = None) -> tuple[Any, lf.Adapter, dict[str, Any], Any]:
    """A small model with an adapter, and the module."""
    model, adapter, params = adapted(variant or lf.LoRA(r=2), mlp(), targets=ALL)
    return model, adapter, params, lf.bind(adapter, model, params)


def values(params: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: leaf.detach().clone() for key, leaf in params.items()}


# parameters


def test_its_trainable_parameters_are_the_leaves():
    """The very tensors of the dict, under its keys; the base is frozen, in the module alone."""
    model, _, params, module = bound()
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert trainable.keys() == params.keys()
    assert all(trainable[key] is leaf for key, leaf in params.items())
    assert all(isinstance(leaf, nn.Parameter) for leaf in params.values())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off_it_marks_nothing(mode):
    """There a module is for inference, and its leaves may be views of what another one trains."""
    model, adapter, params = adapted(lf.LoRA(r=2), mlp(), targets=ALL)
    with mode():
        module = lf.bind(adapter, model, params)
    assert not any(p.requires_grad for p in (*params.values(), *module.parameters()))


def test_computed_leaves_are_buffers():
    """Gradients reach what they were computed from."""
    model, adapter, params = adapted(lf.LoRA(r=2), mlp(), targets=ALL)
    sources = {key: leaf.requires_grad_() for key, leaf in params.items()}
    module = lf.bind(adapter, model, {key: 2 * leaf for key, leaf in sources.items()})
    assert not any(p.requires_grad for p in module.parameters())
    assert sources.keys() <= dict(module.named_buffers()).keys()
    module(torch.randn(3, 6)).sum().backward()
    assert all(leaf.grad is not None for leaf in sources.values())


def test_leaves_with_an_example_axis_train():
    model, adapter, params = adapted(lf.DoRA(r=2), mlp(), targets=ALL)
    several = lf.stack([params, {key: 2 * leaf for key, leaf in params.items()}])
    module, x = lf.bind(adapter, model, several), torch.randn(2, 6)
    assert all(dict(module.named_parameters())[key] is leaf for key, leaf in several.items())
    module(x).sum().backward()
    for i, alone in enumerate(lf.unstack(values(several))):
        leaves = {key: leaf.clone().requires_grad_() for key, leaf in alone.items()}
        adapter(model, leaves, x[i : i + 1]).sum().backward()
        for key, leaf in leaves.items():
            torch.testing.assert_close(several[key].grad[i], leaf.grad)  # pyright: ignore


def test_a_bound_module_is_no_base():
    _model, adapter, params, module = bound()
    with pytest.raises(lf.LoraFuncError, match="carries an adapter already: the model is a bound"):
        lf.bind(adapter, module, params)


class Fused(nn.Module):
    """A model with a loss that takes the weight of the head, as those without logits do."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, fused: bool = False) -> torch.Tensor:
        h = self.body(x)
        return nn.functional.linear(h, self.head.weight) if fused else self.head(h)


def test_a_head_that_is_called_and_then_only_read():
    """TRL's GRPOTrainer generates with the head, and computes its loss from the weight alone."""
    model, adapter, params = adapted(lf.LoRA(r=2), Fused(), targets=ALL)
    module, x = lf.bind(adapter, model, params), torch.randn(3, 6)
    module.train()(x)
    for run in (lambda: module(x, fused=True), lambda: adapter(model, params, ((x, True)))):
        with pytest.raises(lf.LoraFuncError, match=r"Fused read the weight of 'head' and did not"):
            run()
    module(x)
    _ = module.head.weight.norm()  # outside of a forward, anyone may look at it
    module(x)


# state


def test_its_state_is_that_of_the_adapter():
    _model, adapter, params, module = bound(lf.PiSSA(r=2))
    state = module.state_dict()
    assert largest(state, {**values(params), **adapter.frozen}) == 0
    assert not any(tensor.requires_grad for tensor in state.values())
    outer = nn.ModuleDict({"first": module, "second": nn.Linear(2, 2)})
    keys = {f"first.{key}" for key in state} | {"second.weight", "second.bias"}
    assert outer.state_dict().keys() == keys


@pytest.mark.parametrize("outer", [False, True])
def test_a_state_goes_into_the_leaves(outer):
    """In place, whatever its dtype, and also where the module is a part of another one."""
    model, adapter, params, module = bound(lf.PiSSA(r=2))
    leaves, x = dict(params), torch.randn(3, 6)
    others = {key: leaf + 1 for key, leaf in values(params).items()}
    state = {**{key: leaf.double() for key, leaf in others.items()}, **adapter.frozen}
    if outer:
        state = {f"0.{key}": tensor for key, tensor in state.items()}
        nn.Sequential(module).load_state_dict(state)
    else:
        module.load_state_dict(state)
    assert all(params[key] is leaf and leaf.dtype == torch.float32 for key, leaf in leaves.items())
    assert largest(values(params), others) < 1e-6
    assert torch.equal(module(x), adapter(model, params, x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("key", "other", "message"),
    [
        ("0.lora_A", torch.zeros(3, 6), r"'0.lora_A' has shape \(3, 6\), not \(2, 6\)"),
        ("0.lora_A0", torch.zeros(3, 6), r"'0.lora_A0' has shape \(3, 6\), not \(2, 6\)"),
        ("0.lora_A0", torch.zeros(2, 6), "constant '0.lora_A0' is that of another adapter"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(strict, key, other, message):
    _model, adapter, params, module = bound(lf.PiSSA(r=2))
    start = values(params)
    state = {**{key: leaf + 1 for key, leaf in start.items()}, **adapter.frozen, key: other}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state, strict=strict)
    assert largest(values(params), start) == 0


def test_a_strict_load_wants_every_key_and_no_other():
    model, _adapter, _params, module = bound()
    state = module.state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.lora_A"'):
        module.load_state_dict({key: t for key, t in state.items() if key != "0.lora_A"})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0\.weight"'):
        module.load_state_dict({**state, "0.weight": model[0].weight})


def test_what_strict_false_allows():
    """Keys may be missing or too many, but not all: such a state is that of something else."""
    model, _adapter, params, module = bound()
    start, first = values(params), next(iter(params))
    found = module.load_state_dict({first: start[first] + 1, "else": start[first]}, strict=False)
    assert found.missing_keys == [key for key in params if key != first]
    assert found.unexpected_keys == ["else"]
    assert largest(values(params), {**start, first: start[first] + 1}) == 0
    with pytest.raises(RuntimeError, match=r"missing '0.lora_A'"):
        module.load_state_dict(model.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r"has shape \(1,\), not \(2, 6\)"):
        module.load_state_dict({first: torch.zeros(1)}, strict=False)


# copies


def test_a_copy_has_leaves_of_its_own_on_the_same_base():
    model, adapter, params, module = bound(lf.PiSSA(r=2))
    twin, x = copy.deepcopy(module), torch.randn(3, 6)
    assert torch.equal(twin(x), module(x))
    shared = {p.data_ptr() for p in twin.parameters() if not p.requires_grad}
    assert shared == {p.data_ptr() for p in model.parameters()}
    own = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    assert own.keys() == params.keys()
    with torch.no_grad():
        for leaf in own.values():
            leaf.add_(1)
    expected = {key: leaf + 1 for key, leaf in values(params).items()}
    assert torch.equal(twin(x), adapter(model, expected, x))
    assert torch.equal(module(x), adapter(model, params, x))
    assert largest(twin.state_dict(), {**expected, **adapter.frozen}) == 0
    twin.double()
    assert all(p.dtype == torch.float32 for p in (*module.parameters(), *model.parameters()))


def test_a_copy_of_a_packed_base_is_refused():
    """An average over the copy's parameters would round the bytes that it shares."""

    class Packed(nn.Linear):
        def __init__(self):
            super().__init__(6, 4)
            self.codes = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)

    model, adapter, params = adapted(lf.LoRA(r=2), nn.Sequential(Packed()), targets=ALL)
    module = lf.bind(adapter, model, params)
    with pytest.raises(lf.LoraFuncError, match=r"'0.layer.codes' holds torch.uint8.*lf.bind\("):
        copy.deepcopy(module)


@pytest.mark.parametrize("variant", [lf.LoRA(r=2), lf.VeRA(r=2)], ids=lambda v: v.name())
def test_a_pickled_module_trains(variant):
    _, _, params, module = bound(variant)
    twin, x = pickle.loads(pickle.dumps(module)), torch.randn(3, 6)
    own = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    assert own.keys() == params.keys()
    optimizer, before = torch.optim.SGD(own.values(), lr=1.0), twin(x)
    before.square().mean().backward()
    optimizer.step()
    assert not torch.equal(twin(x), before)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x))


# moves


def test_constants_keep_their_dtype_and_layers_share_theirs():
    """A cast rounds the leaves, which are to be trained, and not what a method rests on."""
    _model, adapter, params, module = bound(lf.VeRA(r=2))
    kept = dict(adapter.frozen)
    module.bfloat16()
    state = module.state_dict()
    assert {leaf.dtype for leaf in params.values()} == {torch.bfloat16}
    assert all(torch.equal(state[key], constant) for key, constant in kept.items())
    module.load_state_dict(state)


@pytest.mark.parametrize("variant", [lf.PiSSA(r=2), lf.VeRA(r=2)], ids=lambda v: v.name())
def test_constants_move_with_the_leaves(variant):
    """To the device "meta", which every machine has."""
    model, adapter, _, module = bound(variant)
    module.to("meta")
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert module(torch.randn(3, 6, device="meta")).is_meta
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *adapter.frozen.values()))


def test_other_parameters_through_functional_call():
    model, adapter, params, module = bound(lf.DoRA(r=2))
    others, x = {key: leaf + 1 for key, leaf in values(params).items()}, torch.randn(3, 6)
    assert torch.equal(functional_call(module, others, (x,)), adapter(model, others, x))
    assert torch.equal(module(x), adapter(model, params, x))


# transformers


def test_a_bound_model_has_configs_of_its_own():
    """TRL writes the tokenizer's ids to them, and a user how to generate."""
    model, adapter, params = adapted(model=tiny_llama())
    before, kind = model.config.to_dict(), model.config._attn_implementation
    module: Any = lf.bind(adapter, model, params)
    module.config.pad_token_id = 5
    module.generation_config.max_new_tokens = 1
    module.set_attn_implementation("eager")
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == kind
    assert model.generation_config.max_new_tokens is None
    attention = module.model.layers[0].self_attn
    assert attention.config is module.config
    assert module(**text_batch()).logits.shape == (3, 10, 64)


def test_save_pretrained(tmp_path):
    model, adapter, params = adapted(model=tiny_llama())
    module: Any = lf.bind(adapter, model, params)
    module.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()
    module.save_pretrained(tmp_path / "a")
    assert load_file(tmp_path / "a" / "model.safetensors").keys() == params.keys()
    others = {key: leaf + 1 for key, leaf in values(params).items()}
    module.save_pretrained(tmp_path / "a", state_dict=others)
    _, loaded = lf.load(tmp_path / "a" / "model.safetensors", model)
    assert largest(loaded, others) == 0
    with pytest.raises(lf.LoraFuncError, match=r"state_dict: .*missing"):
        module.save_pretrained(tmp_path / "a", state_dict={"x": torch.ones(1)})
    with pytest.raises(lf.LoraFuncError, match="upload the folder with"):
        module.save_pretrained(tmp_path / "a", push_to_hub=True)


def test_only_a_model_that_has_it_gets_save_pretrained():
    *_, module = bound()
    assert not hasattr(module, "save_pretrained")


def test_training_leaves_the_model_as_it_is():
    model, adapter, params = adapted(lf.PiSSA(r=2), tiny_llama())
    before, start = state_of(model), values(params)
    module = lf.bind(adapter, model, params).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        module(**text_batch()).loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    assert largest(values(params), start) > 1e-3
    assert state_of(model) == before
