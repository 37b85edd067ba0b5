"""A bound module in TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, disable_progress_bars
from models import largest, state_of, text_batch
from safetensors.torch import load_file
from torch import Tensor
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
    by_hand,
    copies,
    text,
    tokenizer,
    weights,
)
from transformers import TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)

import lora_func as lf

pytestmark = pytest.mark.filterwarnings("ignore:.*removed in v6:FutureWarning")
disable_progress_bars()

# What a user sets. The rest are TRL's defaults: gradient checkpointing, a loss without logits.
OWN: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": HALF,
    "per_device_train_batch_size": ROWS,
    "learning_rate": RATE,
    "weight_decay": DECAY,
    "max_grad_norm": CLIP,
    "warmup_steps": WARMUP,
    "train_sampling_strategy": "sequential",
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "bf16": False,  # to compare with a loop in float32
}
CHATS = [
    {
        "messages": [
            {"role": "user", "content": text(i)},
            {"role": "assistant", "content": text(100 + i)},
        ]
    }
    for i in range(STEPS * ROWS)
]
PAIRS = [
    {"prompt": text(i) + " ", "chosen": text(100 + i), "rejected": text(200 + i)}
    for i in range(STEPS * ROWS)
]
PROMPTS = [{"prompt": text(i) + " "} for i in range(STEPS * ROWS)]


def sft(folder: Path, module: Any, **options: Any) -> SFTTrainer:
    return SFTTrainer(
        module,
        args=SFTConfig(str(folder), **{**OWN, **options}),
        train_dataset=Dataset.from_list(CHATS),
        processing_class=tokenizer(),
    )


def logps(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The log probability of each token that `mask` marks, `[rows, length - 1]`."""
    found = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return found * mask[:, 1:]


# SFTTrainer


def test_sft(tmp_path):
    model, adapter, params = adapted()
    start, before = copies(params), state_of(model)
    trainer = sft(tmp_path, lf.bind(adapter, model, params), save_strategy="no")
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    expected = by_hand(start, batches, lambda p, batch: adapter(model, p, batch).loss)
    assert largest(copies(params), expected) < 1e-5
    assert largest(copies(params), start) > 1e-3
    assert state_of(model) == before


def test_sft_with_its_own_settings(tmp_path):
    """In bfloat16, as TRL wants it: its rounding is noise in each step, of another direction."""
    model, adapter, params = adapted()
    start, before = copies(params), state_of(model)
    trainer = sft(tmp_path, lf.bind(adapter, model, params), save_strategy="no", bf16=None)
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    expected = by_hand(start, batches, lambda p, batch: adapter(model, p, batch).loss)
    for key, leaf in copies(params).items():
        way, wanted = (leaf - start[key]).flatten(), (expected[key] - start[key]).flatten()
        assert F.cosine_similarity(way, wanted, 0) > 0.95
    assert state_of(model) == before


class Stop(TrainerCallback):
    """Ends a run half-way, as a machine that is taken away does."""

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == HALF


def test_sft_that_is_stopped_and_resumed(tmp_path):
    model, adapter, params = adapted()
    sft(tmp_path / "whole", lf.bind(adapter, model, params), save_strategy="no").train()
    model, adapter, first = adapted()
    trainer = sft(tmp_path / "halves", lf.bind(adapter, model, first))
    trainer.add_callback(Stop())
    trainer.train()
    checkpoint = tmp_path / "halves" / f"checkpoint-{HALF}"
    assert load_file(checkpoint / "model.safetensors").keys() == params.keys()
    model, adapter, second = adapted(seed=7)
    before = state_of(model)
    sft(tmp_path / "halves", lf.bind(adapter, model, second)).train(str(checkpoint))
    assert largest(copies(second), copies(params)) == 0
    assert largest(copies(second), copies(first)) > 1e-3
    assert state_of(model) == before
    again, loaded = lf.load(tmp_path / "halves" / f"checkpoint-{STEPS}", model)
    batch = text_batch()
    assert torch.equal(again(model, loaded, batch).logits, adapter(model, params, batch).logits)


# DPOTrainer


def dpo(folder: Path, module: Any, ref_model: Any, **options: Any) -> DPOTrainer:
    return DPOTrainer(
        module,
        ref_model=ref_model,
        args=DPOConfig(str(folder), **{**OWN, "save_strategy": "no", **options}),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer(),
    )


def dpo_loss(model: Any, adapter: lf.Adapter, start: dict[str, Tensor] | None = None):
    """Rafailov et al. 2023, arXiv:2305.18290, equation 7, with TRL's beta of 0.1.

    The reference is the model, or the model with the adapter at `start`.
    """

    def loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        ids, mask = batch["input_ids"], batch["completion_mask"]
        inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            out = model(**inputs) if start is None else adapter(model, start, inputs)
            reference = logps(out.logits, ids, mask).sum(1)
        ratio = logps(adapter(model, params, inputs).logits, ids, mask).sum(1) - reference
        chosen, rejected = ratio.chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    return loss


@pytest.mark.parametrize("bf16", [False, True])
def test_dpo_against_the_base_itself(tmp_path, bf16):
    """The reference is the very model that the adapter is on: no second copy of it."""
    model, adapter, params = adapted()
    start, before = copies(params), weights(model)
    trainer = dpo(tmp_path, lf.bind(adapter, model, params), model, bf16=bf16)
    assert trainer.ref_model is model
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    clean = base()
    expected = by_hand(start, batches, dpo_loss(clean, adapter))
    assert largest(copies(params), start) > 1e-3
    assert largest(weights(model), before) == 0
    if not bf16:
        assert largest(copies(params), expected) < 1e-5
    # TRL and accelerate have put a forward of their own on the model. It does not hide the adapter.
    batch = text_batch()
    logits = adapter(clean, params, batch).logits
    rounding = 0.02 if bf16 else 0  # of autocast, where the logits are of size 1
    assert (logits - clean(**batch).logits).abs().max() > 0.1
    for out in (adapter(model, params, batch), lf.bind(adapter, model, params)(**batch)):
        assert (out.logits - logits).abs().max() <= rounding


def test_dpo_without_a_reference(tmp_path):
    """TRL loads the base a second time, from where it came from; the result is the same."""
    model, adapter, params = adapted()
    dpo(tmp_path, lf.bind(adapter, model, params), model).train()
    base().save_pretrained(tmp_path / "base")
    loaded = type(model).from_pretrained(tmp_path / "base")
    loaded, adapter, others = adapted(model=loaded)
    before = state_of(loaded)
    trainer = dpo(tmp_path, lf.bind(adapter, loaded, others), None)
    assert trainer.ref_model is not loaded
    trainer.train()
    assert largest(copies(others), copies(params)) == 0
    assert state_of(loaded) == before


def test_dpo_against_the_adapter_as_it_was(tmp_path):
    """A second module on the same base, with leaves of its own that nothing trains."""
    model, adapter, params = adapted()
    with torch.no_grad():
        for leaf in params.values():
            leaf.add_(0.1 * torch.randn_like(leaf))
        start = copies(params)
        reference = lf.bind(adapter, model, copies(start))
    before = state_of(model)
    trainer = dpo(tmp_path, lf.bind(adapter, model, params), reference)
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    expected = by_hand(start, batches, dpo_loss(model, adapter, start))
    assert largest(copies(params), expected) < 1e-5
    assert largest(copies(params), start) > 1e-3
    assert largest(reference.state_dict(), start) == 0
    assert state_of(model) == before


# GRPOTrainer


def reward(completions: list[str], **_: Any) -> list[float]:
    """How many different words there are."""
    return [float(len(set(completion.split()))) for completion in completions]


def test_grpo(tmp_path):
    """By hand on the completions that it drew: Shao et al. 2024, arXiv:2402.03300."""
    model, adapter, params = adapted()
    start, before, seen = copies(params), state_of(model), []
    module: Any = lf.bind(adapter, model, params)
    own = {**OWN, "max_steps": 3, "save_strategy": "no", "warmup_steps": 0}
    trainer = GRPOTrainer(
        module,
        reward_funcs=reward,
        args=GRPOConfig(str(tmp_path), **own, num_generations=ROWS, max_completion_length=8),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tokenizer(),
    )
    compute = trainer.compute_loss

    def noted(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        seen.append(inputs)
        return compute(model, inputs, **options)

    trainer.compute_loss = noted  # type: ignore
    trainer.train()

    def loss(params: dict[str, Tensor], drawn: dict[str, Tensor]) -> Tensor:
        ids = torch.cat([drawn["prompt_ids"], drawn["completion_ids"]], 1)
        mask = torch.cat([drawn["prompt_mask"], drawn["completion_mask"]], 1)
        answer = torch.cat([0 * drawn["prompt_mask"], drawn["completion_mask"]], 1)
        inputs = {"input_ids": ids, "attention_mask": mask}
        found = logps(adapter(model, params, inputs).logits, ids, answer)
        ratio = (found - found.detach()).exp() * answer[:, 1:]
        return -(ratio * drawn["advantages"][:, None]).sum() / answer.sum()

    assert len(seen) == 3
    assert all(drawn["advantages"].abs().max() > 0 for drawn in seen)
    expected = by_hand(start, seen, loss, lambda step: 1 - step / 3)
    assert largest(copies(params), expected) < 1e-5
    assert largest(copies(params), start) > 1e-3
    assert state_of(model) == before


# a head that is adapted


def test_a_loss_without_logits_leaves_an_adapted_head_out(tmp_path):
    """All three take the weight of the head, and GRPO has called it before, to generate."""
    model, adapter, params = adapted(targets=lf.Targets(names=(r"q_proj$", r"^lm_head$")))
    options = {"processing_class": tokenizer(), "train_dataset": Dataset.from_list(PROMPTS)}
    own = {**OWN, "max_steps": 1, "save_strategy": "no"}
    trainers = [
        sft(tmp_path, lf.bind(adapter, model, params), **own),
        dpo(tmp_path, lf.bind(adapter, model, params), model, **own),
        GRPOTrainer(
            lf.bind(adapter, model, params),  # pyright: ignore
            reward_funcs=reward,
            args=GRPOConfig(str(tmp_path), **own, num_generations=ROWS, max_completion_length=8),
            **options,
        ),
    ]
    for trainer in trainers:
        with pytest.raises(lf.LoraFuncError, match=r"the weight of 'lm_head'"):
            trainer.train()
