"""Dropout of what the adapter sees, against PEFT's, and under the engine's transforms."""

from __future__ import annotations

import pickle
from typing import Any

import peft
import pytest
import torch
from models import adapted, checkpoint_activations, largest, text_batch, tiny_llama, trained
from torch import nn

import lora_func as lf

NAMES = (r"q_proj$", r"v_proj$")
TARGETS = lf.Targets(names=NAMES)


def dropping(model, dropout: float = 0.5, **options):
    adapter, params = lf.adapt(model, lf.LoRA(r=4), targets=TARGETS, dropout=dropout, **options)
    return adapter, trained(params)


def seeded(function, seed: int = 3):
    torch.manual_seed(seed)
    return function()


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # of PEFT's own imports
def test_it_is_that_of_peft_to_the_bit():
    model = tiny_llama().train()
    adapter, params = dropping(model)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.5, target_modules=["q_proj", "v_proj"]
    )
    other: Any = peft.get_peft_model(tiny_llama(), config).train()
    other.base_model.model.load_state_dict(
        {peft_name(name): t for name, t in model.state_dict().items()}, strict=False
    )
    with torch.no_grad():
        for key, leaf in params.items():
            path, name = key.rsplit(".lora_", 1)
            other.base_model.model.get_parameter(f"{path}.lora_{name}.default.weight").copy_(leaf)
    batch = text_batch()
    expected = seeded(lambda: other(**batch).logits)
    assert torch.equal(seeded(lambda: adapter(model, params, batch).logits), expected)
    module = lf.bind(adapter, model, params)
    assert torch.equal(seeded(lambda: module(**batch).logits), expected)


def peft_name(name: str) -> str:
    """The name of a base tensor in PEFT's model."""
    path, _, tensor = name.rpartition(".")
    return f"{path}.base_layer.{tensor}" if path.endswith(("q_proj", "v_proj")) else name


def test_in_eval_mode_there_is_none():
    model = tiny_llama().eval()
    adapter, params = dropping(model)
    plain, _ = lf.adapt(model, lf.LoRA(r=4), targets=TARGETS)
    batch = text_batch()
    out = adapter(model, params, batch).logits
    assert torch.equal(out, plain(model, params, batch).logits)
    module = lf.bind(adapter, model, params)
    assert torch.equal(module(**batch).logits, out)
    assert not torch.equal(module.train()(**batch).logits, out)


def test_the_base_layer_sees_all_of_its_input():
    """At init the delta is zero, whatever is dropped."""
    model = tiny_llama().train()
    adapter, params = lf.adapt(model, lf.LoRA(r=4), targets=TARGETS, dropout=0.9)
    batch = text_batch()
    assert torch.equal(adapter(model, params, batch).logits, model(**batch).logits)


def test_activation_checkpointing_drops_the_same_entries_again():
    model = tiny_llama().train()
    adapter, params = dropping(model)
    loss = lambda p: adapter(model, p, text).loss  # noqa: E731
    text = text_batch()
    _, wanted = seeded(lambda: lf.value_and_grad(loss)(params))
    checkpoint_activations(model, use_reentrant=False)
    _, given = seeded(lambda: lf.value_and_grad(loss)(params))
    assert largest(given, wanted) == 0


def test_a_population_drops_for_each_example():
    """Equal examples with equal adapters see different inputs."""
    model = tiny_llama().train()
    adapter, params = dropping(model)
    batch = {"input_ids": torch.arange(1, 9).expand(2, -1)}
    same = lf.expand(params, 2)
    first, second = adapter(model, same, batch).logits
    assert (first - second).abs().max() > 1e-4
    model.eval()
    first, second = adapter(model, same, batch).logits
    torch.testing.assert_close(first, second)


def test_compiled():
    """The expected value over many masks is that of eval mode."""
    layer = nn.Sequential(nn.Linear(8, 8)).train()
    adapter, params = lf.adapt(layer, lf.LoRA(r=2), dropout=0.5)
    params = trained(params)
    x = torch.ones(20_000, 8)
    compiled = torch.compile(lambda p: adapter(layer, p, x), fullgraph=True)
    out = compiled(params)
    assert out.std(dim=0).min() > 0  # rows of equal inputs differ
    expected = adapter(layer.eval(), params, x)
    error = (out.mean(dim=0) - expected[0]).abs() / (out.std(dim=0) / len(x) ** 0.5)
    assert error.max() < 5  # standard errors


def test_it_stays_with_the_adapter(tmp_path):
    model = tiny_llama()
    adapter, params = dropping(model, 0.25)
    lf.save(tmp_path / "a", adapter, params)
    others = [lf.load(tmp_path / "a", model)[0], pickle.loads(pickle.dumps(adapter))]
    others += [adapter.replace(alpha=4.0), adapter.to(torch.float32)]
    assert {other.dropout for other in others} == {0.25}
    _, plain, _ = adapted()
    assert plain.dropout == 0


@pytest.mark.parametrize("dropout", [1.0, -0.1, True, "0.1", None])
def test_no_probability(dropout):
    with pytest.raises(lf.LoraFuncError, match="expected a probability below 1"):
        lf.adapt(tiny_llama(), lf.LoRA(r=2), dropout=dropout)


def test_where_it_cannot_act():
    model = tiny_llama()
    with pytest.raises(lf.LoraFuncError, match="by OFT, which acts on what the base layer sees"):
        lf.adapt(model, lf.OFT(block_size=8), targets=TARGETS, dropout=0.1)
    parameters = lf.Targets(parameters=("embed_tokens",))
    with pytest.raises(lf.LoraFuncError, match="it is a parameter, which has no input of its own"):
        lf.adapt(model, lf.LoRA(r=2), targets=parameters, dropout=0.1)
    with pytest.raises(lf.LoraFuncError, match=r"It is called adapt\(\.\., dropout=\.\.\) here"):
        lf.LoRA(r=2, lora_dropout=0.1)  # pyright: ignore
