"""A LightningModule that holds a bound module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import largest, state_of, text_batch
from torch import Tensor
from toys import (
    CLIP,
    DECAY,
    HALF,
    RATE,
    ROWS,
    adapted,
    base,
    batches,
    by_hand,
    copies,
    rows,
    schedule,
    weights,
)
from transformers import default_data_collator

import lora_func as lf

with warnings.catch_warnings():  # of its own imports
    warnings.simplefilter("ignore")
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{of_its_own}")
    for of_its_own in ("isinstance\\(treespec", "have many workers", "exists and is not empty")
]


class Task(lightning.LightningModule):
    """What a user writes. Nothing in it knows of adapters."""

    def __init__(self, module: Any):
        super().__init__()
        self.module = module.train()  # `from_pretrained` returns any model in eval mode

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.module(**batch).loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=DECAY)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


BATCHES = 2 * batches()[:HALF]  # two epochs


def fit(
    folder: Path,
    task: Task,
    epochs: int = 2,
    resume: Path | None = None,
    callbacks: Sequence[lightning.Callback] = (),
) -> None:
    data: Any = rows(HALF * ROWS)
    loader = torch.utils.data.DataLoader(data, batch_size=ROWS, collate_fn=default_data_collator)
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        gradient_clip_val=CLIP,
        callbacks=[keep, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(task, loader, ckpt_path=resume)


@pytest.mark.parametrize("variant", [lf.LoRA(r=4), lf.VeRA(r=4)], ids=lambda v: v.name())
def test_it_trains_the_leaves(variant, tmp_path):
    model, adapter, params = adapted(variant)
    start, before = copies(params), state_of(model)
    fit(tmp_path, Task(lf.bind(adapter, model, params)))
    expected = by_hand(start, BATCHES, lambda p, batch: adapter(model, p, batch).loss)
    assert largest(copies(params), expected) < 1e-5
    assert largest(copies(params), start) > 1e-3
    assert state_of(model) == before


@pytest.mark.parametrize("variant", [lf.LoRA(r=4), lf.VeRA(r=4)], ids=lambda v: v.name())
def test_a_run_that_is_stopped_and_resumed(variant, tmp_path):
    model, adapter, params = adapted(variant)
    fit(tmp_path / "whole", Task(lf.bind(adapter, model, params)))
    model, adapter, first = adapted(variant)
    fit(tmp_path / "halves", Task(lf.bind(adapter, model, first)), 1)
    checkpoint = tmp_path / "halves" / "epoch=0.ckpt"
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert stored.keys() == {f"module.{key}" for key in {**params, **adapter.frozen}}
    model, adapter, second = adapted(variant)
    before = state_of(model)
    fit(tmp_path / "halves", Task(lf.bind(adapter, model, second)), resume=checkpoint)
    assert largest(copies(second), copies(params)) == 0
    assert largest(copies(second), copies(first)) > 1e-3
    assert state_of(model) == before


def test_the_leaves_of_a_checkpoint(tmp_path):
    """A process that knows the adapter needs no Lightning to read them."""
    model, adapter, params = adapted()
    fit(tmp_path, Task(lf.bind(adapter, model, params)))
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    leaves = {key.removeprefix("module."): leaf for key, leaf in state.items()}
    batch = text_batch()
    expected = adapter(model, params, batch).logits
    assert torch.equal(adapter(base(), leaves, batch).logits, expected)


def test_its_average_of_weights(tmp_path):
    """WeightAveraging copies the module, and swaps the average in at the end."""
    model, adapter, params = adapted()
    before, seen = weights(model), []

    class Note(lightning.Callback):
        def on_train_batch_end(self, *_, **__):
            seen.append(copies(params))

    fit(tmp_path, Task(lf.bind(adapter, model, params)), callbacks=[Note(), WeightAveraging()])
    average = {key: torch.stack([leaves[key] for leaves in seen]).mean(0) for key in params}
    assert largest(copies(params), average) < 1e-6
    assert largest(weights(model), before) == 0
