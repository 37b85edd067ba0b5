"""The code of docs/trainers.md runs, in order, in one namespace."""

from __future__ import annotations

import sys
import types
from functools import partial

import pytest
import torch
import torch.distributed as dist
import trl
from datasets import Dataset
from models import largest, text_batch
from test_docs import ROOT, blocks
from test_trl import CHATS, PAIRS, PROMPTS, reward
from toys import ROWS, base, copies, rows, tokenizer, weights
from transformers import default_data_collator

import lora_func as lf

# Of Trainer, TRL and Lightning themselves, of settings that the page leaves as they are.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    alone = partial(dist.init_process_group, rank=0, world_size=1, store=store)
    monkeypatch.setattr(dist, "init_process_group", alone)  # which torchrun would tell it
    for name in ("SFTConfig", "DPOConfig", "GRPOConfig"):  # they want a GPU, or to be told
        monkeypatch.setattr(trl, name, partial(getattr(trl, name), use_cpu=True))
    model = base()
    before, seen = weights(model), []
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    vars(page).update(
        lf=lf,
        torch=torch,
        model=model,
        batch=text_batch(),
        dataset=rows(),
        loader=torch.utils.data.DataLoader(
            rows(),  # pyright: ignore
            batch_size=ROWS,
            collate_fn=default_data_collator,
        ),
        chats=Dataset.from_list(CHATS),
        pairs=Dataset.from_list(PAIRS),
        prompts=Dataset.from_list(PROMPTS),
        reward=reward,
        tokenizer=tokenizer(),
    )
    for block in blocks(ROOT / "docs" / "trainers.md"):
        exec(compile(block, "docs/trainers.md", "exec"), vars(page))
        if any(call in block for call in (".train(", ".fit(", "backward(")):
            seen.append(copies(page.params))
    dist.destroy_process_group()
    assert len(seen) == 10
    # Each recipe has trained what is in `params`: B starts at zero, or in two of them at a file.
    assert all(leaf.abs().max() > 0 for leaves in seen for leaf in leaves.values())
    once, resumed, _, sft, _, dpo, *_ = seen
    assert largest(once, resumed) == 0
    assert largest(sft, dpo) > 0
    assert largest(weights(model), before) == 0
