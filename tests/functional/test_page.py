"""The code of docs/functional.md runs, in order, in one namespace."""

from __future__ import annotations

import sys
import types

import by_hand
import torch
from models import state_of
from test_docs import ROOT, blocks
from torch.utils.data import DataLoader, TensorDataset

import lora_func as lf


def test_the_page_runs(monkeypatch):
    own = by_hand.toy(dtype=torch.float32)
    before = state_of(own.model)
    loader = DataLoader(TensorDataset(own.ids, own.labels), batch_size=3)
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    vars(page).update(
        lf=lf, torch=torch, model=own.model, ids=own.ids, labels=own.labels, loader=loader
    )
    for block in blocks(ROOT / "docs" / "functional.md"):
        exec(compile(block, "docs/functional.md", "exec"), vars(page))
    assert page.features.shape == (len(own.ids), 64)
    assert torch.allclose(page.by_member.softmax(-1).mean(0), page.prediction, atol=1e-5)
    assert all((leaf >= 1).all() for leaf in page.precision.values())
    assert page.probabilities.shape == (len(own.ids), by_hand.CLASSES)
    assert page.epsilon > 0
    assert all(leaf.grad.abs().max() > 0 for leaf in page.written.values())
    assert state_of(own.model) == before
