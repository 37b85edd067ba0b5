"""Public incidents of adapter libraries, and that they cannot happen here.

Each test names the thread in which its users tell what went wrong: a run that looked healthy and
trained, merged or saved nothing, or something else. docs/incidents.md lists them as promises.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from cases import CASES, data_for
from models import adapted, checkpoint_activations, largest, state_of, text_batch, tiny_llama
from models import trained as moved
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import lora_func as lf

Q_V = lf.Targets(names=(r"(q|v)_proj$",))
EVERY = {name: case.example for name, case in CASES.items() if case.trains and case.engine}
over_every = pytest.mark.parametrize("variant", EVERY.values(), ids=EVERY.keys())


def train(module: nn.Module, parameters, batch: dict[str, Tensor], steps: int = 3) -> list[float]:
    """A loop that knows nothing of adapters."""
    optimizer, losses = torch.optim.AdamW(list(parameters), lr=1e-2), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fresh(variant: lf.Variant, model: Any = None, targets: lf.Targets = Q_V):
    model = tiny_llama() if model is None else model
    adapter, params = lf.adapt(model, variant, targets=targets, **data_for(variant, model, targets))
    return model, adapter, params


# nothing was trained


@over_every
def test_training_that_leaves_the_saved_adapter_as_it_was(variant, tmp_path):
    """100 steps, rewards logged, and the saved adapter is bitwise its own start: trl#6700.

    https://github.com/huggingface/trl/issues/6700
    """
    model, adapter, params = fresh(variant)
    start, before = {k: leaf.detach().clone() for k, leaf in params.items()}, state_of(model)
    batch = text_batch()
    module = lf.bind(adapter, model, params)
    losses = train(module, (p for p in module.parameters() if p.requires_grad), batch)
    assert losses[-1] < losses[0]
    lf.save(tmp_path / "a.safetensors", adapter, params)
    again, loaded = lf.load(tmp_path / "a.safetensors", model)
    assert largest(loaded, params) == 0
    assert largest(loaded, start) > 1e-4
    assert torch.equal(again(model, loaded, batch).logits, adapter(model, params, batch).logits)
    assert state_of(model) == before


def test_an_optimizer_of_other_tensors():
    """An optimizer and a model with different tensors, for 45 hours of GPU: opacus#820.

    https://github.com/meta-pytorch/opacus/issues/820
    """
    model, adapter, params = fresh(lf.LoRA(r=4))
    module = lf.bind(adapter, model, params)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    module.double()  # made after the optimizer: the parameters stay the same objects
    copies = {key: leaf.detach().clone() for key, leaf in params.items()}
    module(**text_batch()).loss.backward()
    optimizer.step()
    assert all(leaf.dtype == torch.float64 for leaf in params.values())
    assert any(not torch.equal(leaf, copies[key]) for key, leaf in params.items())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_checkpointing_that_swallows_gradients():
    """Reentrant checkpointing of a frozen base gives every adapter None: transformers#42489.

    https://github.com/huggingface/transformers/issues/42489
    """
    model, adapter, params = fresh(lf.LoRA(r=4))
    module = lf.bind(adapter, model, params).train()
    checkpoint_activations(module, use_reentrant=False)
    module(**text_batch()).loss.backward()
    assert all(leaf.grad is not None for leaf in params.values())
    model.train()
    checkpoint_activations(model, use_reentrant=True)
    with pytest.raises(lf.LoraFuncError, match="use_reentrant=False"):
        adapter(model, params, text_batch())


def test_a_second_adapter_that_switches_the_first_off():
    """To activate one adapter froze the other, and a joint loss trained one: peft#2436.

    https://github.com/huggingface/peft/issues/2436
    """
    model, first, params = fresh(lf.LoRA(r=4))
    _, second, others = fresh(lf.IA3(), model, lf.Targets(names=(r"k_proj$",)))
    for leaf in (*params.values(), *others.values()):
        leaf.requires_grad_()
    batch = text_batch()
    (first(model, params, batch).loss + second(model, others, batch).loss).backward()
    assert any(leaf.grad.abs().max() > 0 for leaf in params.values())
    assert any(leaf.grad.abs().max() > 0 for leaf in others.values())


# nothing was loaded


def test_an_adapter_whose_names_match_nothing(tmp_path):
    """The server answered with the base model, without an error: vllm#34186, peft#1678.

    https://github.com/vllm-project/vllm/issues/34186
    """
    model, adapter, params = adapted()
    lf.save(tmp_path / "a.safetensors", adapter, params)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.language_model = model

    with pytest.raises(lf.LoraFuncError, match=r"has no layer 'model.layers.0.self_attn.q_proj'"):
        lf.load(tmp_path / "a.safetensors", Wrapper())
    renamed = {f"base_model.{key}": leaf for key, leaf in params.items()}
    with pytest.raises(lf.LoraFuncError, match=r"missing 'model.layers.0.* unexpected 'base_"):
        adapter(model, renamed, text_batch())
    with pytest.raises(RuntimeError, match="Missing key"):
        lf.bind(adapter, model, params).load_state_dict(renamed)


def test_a_model_class_that_never_calls_the_target():
    """A typo in target_modules adapted nothing, or half: peft#2084 turned it into a warning.

    https://github.com/huggingface/peft/pull/2084
    """
    with pytest.raises(lf.LoraFuncError, match=r"'qproj' matches no layer .* mean 'q_proj'"):
        lf.adapt(tiny_llama(), lf.LoRA(r=4), targets=lf.Targets(names=("q_proj", "qproj")))


# the merge was something else


@over_every
def test_a_merge_without_the_adapter(variant):
    """The merged model answered as the base, or as nothing known: unsloth#2009, peft#2502.

    https://github.com/unslothai/unsloth/issues/2009
    """
    model, adapter, params = fresh(variant, tiny_llama().double())
    params, batch = moved(params), text_batch()
    merged = lf.merge(adapter, model, params)
    whole = copy.deepcopy(model)
    assert not whole.load_state_dict(merged, strict=False).unexpected_keys
    expected = adapter(model, params, batch).logits
    torch.testing.assert_close(whole(**batch).logits, expected, rtol=1e-6, atol=1e-6)
    assert (whole(**batch).logits - model(**batch).logits).abs().max() > 1e-6


def test_a_trained_head_that_a_tied_embedding_swallows():
    """The head was trained, and discarded when the model was merged: unsloth#9331.

    https://github.com/unslothai/unsloth/pull/9331
    """
    model = tiny_llama(tie_word_embeddings=True)
    adapter, params = lf.adapt(model, {r"lm_head$": lf.LoRA(r=4)})
    params, batch = moved(params), text_batch()
    hidden = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    A, B = params["lm_head.lora_A"], params["lm_head.lora_B"]
    expected = model.lm_head(hidden) + 4.0 * (hidden @ A.mT) @ B.mT
    torch.testing.assert_close(adapter(model, params, batch).logits, expected)
    with pytest.raises(lf.LoraFuncError, match=r"'lm_head' shares its weight with 'model.embed"):
        lf.merge(adapter, model, params)


def test_an_adapter_of_fused_experts_that_does_nothing():
    """An adapter of fused experts loaded without a warning, and changed nothing: vllm#41754.

    https://github.com/vllm-project/vllm/issues/41754
    """
    model = ARCHITECTURES["gpt_oss"][0]()
    with pytest.raises(lf.LoraFuncError, match=r"experts\.gate_up_proj' fuses 4 matrices"):
        lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(names=(r"experts\.gate_up_proj",)))


def test_a_layer_that_holds_its_weight_transposed():
    """GPT-2's Conv1D: its update must be transposed, also where it is square."""
    model = ARCHITECTURES["gpt2"][0]().eval()
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(names=("c_proj$",)))
    params, batch = moved(params), ARCHITECTURES["gpt2"][1]()
    merged = functional_call(model, lf.merge(adapter, model, params), (), batch)
    torch.testing.assert_close(adapter(model, params, batch).logits, merged.logits)


# somebody else's adapter


@over_every
def test_an_example_that_sees_its_neighbours(variant):
    """Lily averages its router's weights over the batch: an answer depends on who else asks.

    https://github.com/huggingface/peft/issues/2563
    """
    model, adapter, params = fresh(variant)
    params, batch = moved(params), text_batch(rows=3)
    mask = torch.ones_like(batch["attention_mask"])
    together = adapter(model, params, {"input_ids": batch["input_ids"], "attention_mask": mask})
    for row in range(3):
        alone = {"input_ids": batch["input_ids"][row, None], "attention_mask": mask[row, None]}
        given = adapter(model, params, alone).logits[0]
        torch.testing.assert_close(given, together.logits[row], rtol=1e-4, atol=1e-5)


@over_every
def test_an_example_that_sees_its_padding(variant):
    """What stands behind the mask changes nothing in front of it."""
    model, adapter, params = fresh(variant)
    params, batch = moved(params), text_batch(rows=2)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    other = torch.where(mask == 1, ids, (ids + 7) % 64)
    first, second = (
        adapter(model, params, {"input_ids": i, "attention_mask": mask}).logits[mask == 1]
        for i in (ids, other)
    )
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@over_every
def test_a_reference_model_that_carries_the_adapter(variant):
    """A loaded adapter made the reference another model than was meant: trl#1340.

    https://github.com/huggingface/trl/issues/1340
    """
    model, adapter, params = fresh(variant)
    batch = text_batch()
    before = model(**batch).logits
    module = lf.bind(adapter, model, params)
    train(module, (p for p in module.parameters() if p.requires_grad), batch)
    assert torch.equal(model(**batch).logits, before)
    assert not torch.equal(module(**batch).logits, before)


# the file was something else


def test_a_checkpoint_that_reloads_as_a_random_model(tmp_path):
    """Keys that no model has: from_pretrained starts afresh, and warns at most: peft#2118."""
    model, adapter, params = adapted()
    module = lf.bind(adapter, model, params)
    module.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"holds an adapter of lora_func, which lora_func\.load reads"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    _, loaded = lf.load(tmp_path / "adapter", model)
    assert largest(loaded, params) == 0
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(lf.LoraFuncError, match=r"holds a model \(config.json\)"):
        module.save_pretrained(tmp_path / "base")


def test_an_adapter_that_a_crash_replaces_by_half_a_file(tmp_path):
    """A save that fails leaves the old file: see tests/test_crash.py for kills."""
    _, adapter, params = adapted()
    path = tmp_path / "a.safetensors"
    lf.save(path, adapter, params)
    content = path.read_bytes()
    with pytest.raises(lf.LoraFuncError):
        lf.save(path, adapter, {**params, "model.layers.9.lora_A": torch.zeros(1)})
    assert path.read_bytes() == content


def test_the_docs_list_every_incident():
    here = Path(__file__)
    threads = re.findall(r"https://github\.com/[\w./-]+", here.read_text(encoding="utf-8"))
    listed = (here.parents[1] / "docs" / "incidents.md").read_text(encoding="utf-8")
    assert [url for url in threads if url.rstrip("\\S+") not in listed] == []
