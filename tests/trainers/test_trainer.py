"""A bound module in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import largest, state_of, text_batch, tiny_llama
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toys import (
    CLIP,
    DECAY,
    HALF,
    RATE,
    ROWS,
    STEPS,
    WARMUP,
    adapted,
    base,
    batches,
    by_hand,
    copies,
    rows,
)
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import lora_func as lf

pytestmark = pytest.mark.filterwarnings("ignore:.*removed in v6:FutureWarning")
VARIANTS = [lf.LoRA(r=4), lf.PiSSA(r=4), lf.VeRA(r=4), lf.DoRA(r=4), lf.AntiPaSTO(r=4)]
over_variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name())


def train(
    folder: Path, module: Any, resume: Path | None = None, callbacks: Any = (), **options: Any
) -> Trainer:
    settings = {
        "max_steps": STEPS,
        "save_steps": HALF,
        "per_device_train_batch_size": ROWS // 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "max_grad_norm": CLIP,
        "warmup_steps": WARMUP,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }
    trainer = Trainer(
        module,
        TrainingArguments(str(folder), **settings),
        train_dataset=rows(),  # pyright: ignore
        eval_dataset=rows(ROWS),  # pyright: ignore
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@over_variants
def test_it_trains_the_leaves(variant, tmp_path):
    """As the loop by hand does: the same batches, schedule, decay, clipping, accumulation."""
    model, adapter, params = adapted(variant)
    start, before = copies(params), state_of(model)
    module = lf.bind(adapter, model, params)
    assert module.num_parameters(only_trainable=True) == sum(p.numel() for p in params.values())  # pyright: ignore
    train(tmp_path, module, save_strategy="no")
    expected = by_hand(start, batches(), lambda p, batch: adapter(model, p, batch).loss)
    assert largest(copies(params), expected) < 1e-5
    assert largest(copies(params), start) > 1e-3
    assert state_of(model) == before


class Stop(TrainerCallback):
    """Ends a run half-way, as a machine that is taken away does."""

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == HALF


@over_variants
def test_a_run_that_is_stopped_and_resumed(variant, tmp_path):
    """It ends as the run in one piece does, with a new model, adapter and module."""
    model, adapter, params = adapted(variant)
    train(tmp_path / "whole", lf.bind(adapter, model, params), save_strategy="no")
    model, adapter, first = adapted(variant)
    train(tmp_path / "halves", lf.bind(adapter, model, first), callbacks=[Stop()])
    model, adapter, second = adapted(variant)
    before = state_of(model)
    module = lf.bind(adapter, model, second)
    train(tmp_path / "halves", module, tmp_path / "halves" / f"checkpoint-{HALF}")
    assert largest(copies(second), copies(params)) == 0
    assert largest(copies(second), copies(first)) > 1e-3
    assert state_of(model) == before


def test_resuming_needs_no_seed_where_nothing_but_leaves_was_drawn(tmp_path):
    model, adapter, params = adapted()
    train(tmp_path, lf.bind(adapter, model, params))
    model, adapter, others = adapted(seed=7)
    train(tmp_path / "other", lf.bind(adapter, model, others), tmp_path / f"checkpoint-{HALF}")
    assert largest(copies(others), copies(params)) == 0


def test_resuming_another_adapter_is_refused(tmp_path):
    """Trainer loads with strict=False, which would go on from the start of the new one."""
    model, adapter, params = adapted(lf.VeRA(r=4))
    train(tmp_path, lf.bind(adapter, model, params))
    resume = tmp_path / f"checkpoint-{HALF}"
    _, adapter, params = adapted(lf.VeRA(r=4), seed=7, model=model)
    with pytest.raises(RuntimeError, match=r"constant 'shared.lora_A' is that of another adapter"):
        train(tmp_path / "other", lf.bind(adapter, model, params), resume)
    _, adapter, params = adapted(lf.LoRA(r=4), model=model)
    with pytest.raises(RuntimeError, match=r"missing 'model.layers.0.*lora_A'"):
        train(tmp_path / "other", lf.bind(adapter, model, params), resume)


@over_variants
def test_a_checkpoint_holds_the_adapter_alone(variant, tmp_path):
    model, adapter, params = adapted(variant)
    trainer = train(tmp_path, lf.bind(adapter, model, params))
    trainer.save_model(str(tmp_path / "final"))
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    stored = load_file(checkpoint / "model.safetensors")
    assert stored.keys() == {**params, **adapter.frozen}.keys()
    moments = torch.load(checkpoint / "optimizer.pt")["state"].values()
    assert sorted(m["exp_avg"].numel() for m in moments) == sorted(
        leaf.numel() for leaf in params.values()
    )
    batch, fresh = text_batch(), base()
    for folder in (checkpoint, tmp_path / "final"):
        again, loaded = lf.load(folder, fresh)
        assert largest(loaded, copies(params)) == 0
        assert torch.equal(again(fresh, loaded, batch).logits, adapter(model, params, batch).logits)


def test_from_pretrained_refuses_a_checkpoint(tmp_path):
    """It would return a model of random weights."""
    model, adapter, params = adapted()
    train(tmp_path, lf.bind(adapter, model, params))
    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(ValueError, match="holds an adapter of lora_func"):
            kind.from_pretrained(tmp_path / f"checkpoint-{HALF}")


def test_a_folder_with_a_model_is_left_alone(tmp_path):
    model, adapter, params = adapted()
    model.save_pretrained(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    module: Any = lf.bind(adapter, model, params)
    with pytest.raises(lf.LoraFuncError, match=r"holds a model .*give another folder"):
        module.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    module.save_pretrained(tmp_path / "adapter")
    module.save_pretrained(tmp_path / "adapter")  # again, as the last checkpoint of a run may be


def test_the_best_checkpoint_is_loaded(tmp_path):
    """Into the leaves themselves. The metric says that the first one was the best."""
    model, adapter, params = adapted()
    leaves, scores = dict(params), iter([2.0, 1.0, 0.0])
    module = lf.bind(adapter, model, params)
    settings = {"eval_strategy": "steps", "eval_steps": HALF, "load_best_model_at_end": True}
    best = {"metric_for_best_model": "eval_score", "greater_is_better": True}

    class Score(TrainerCallback):
        def on_evaluate(self, args, state, control, **given):
            given["metrics"]["eval_score"] = next(scores)

    trainer = train(tmp_path, module, callbacks=[Score()], **settings, **best)
    kept = load_file(tmp_path / f"checkpoint-{HALF}" / "model.safetensors")
    last = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    assert largest(copies(params), kept) == 0
    assert largest(kept, last) > 1e-3
    assert all(params[key] is leaf for key, leaf in leaves.items())
    loss = adapter(model, params, batches()[0]).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.fixture
def packed(tmp_path) -> Any:
    """A base in 4 bits."""
    tiny_llama(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=settings, dtype=torch.float32
    )
    # In eval mode, bitsandbytes packs the weights anew where the CPU has a kernel for it.
    return model.train()


def test_a_base_in_4_bits(packed, tmp_path):
    """Trainer refuses a packed model without an adapter; it sees ours."""
    with pytest.raises(ValueError, match="quantized"):
        train(tmp_path, packed)
    model, adapter, params = adapted(model=packed)
    start, before = copies(params), state_of(model)
    train(tmp_path, lf.bind(adapter, model, params))
    expected = by_hand(start, batches(), lambda p, batch: adapter(model, p, batch).loss)
    assert largest(copies(params), expected) < 1e-5
    assert largest(copies(params), start) > 1e-3
    assert state_of(model) == before
    stored = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    assert stored.keys() == params.keys()


def test_a_packed_base_is_not_copied(packed):
    """AveragedModel copies a module and averages all of it: 46 of 256 bytes change at 0.9999."""
    model, adapter, params = adapted(model=packed)
    before, module = state_of(model), lf.bind(adapter, model, params)
    average = get_ema_multi_avg_fn(0.9999)
    with pytest.raises(lf.LoraFuncError, match=r"uint8.*AveragedModel.*bind a copy of them"):
        AveragedModel(module, multi_avg_fn=average)
    shadow = copies(params)
    train_step = torch.optim.SGD(params.values(), lr=1.0)
    module(**text_batch()).loss.backward()
    train_step.step()
    average(list(shadow.values()), list(params.values()), 1)
    assert largest(copies(params), shadow) > 0
    assert state_of(model) == before
