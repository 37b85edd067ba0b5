"""Training beside PEFT: the curves of the measurement, on a small model."""

from __future__ import annotations

import pytest
import torch
from models import tiny_llama
from parity import TWINS, compare


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("name", TWINS)
def test_curves_are_pefts(name):
    """A dozen steps of AdamW from the same parameters: only the order of sums differs.

    The layers are as wide as OFT's blocks need. In float32, the only dtype of PEFT's PiSSA.
    """
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    model = tiny_llama(**sizes).requires_grad_(False)
    batches = []
    for _ in range(12):
        ids = torch.randint(1, 64, (3, 10))
        batches.append({"input_ids": ids, "labels": ids})
    row = compare(TWINS[name], model, batches)
    assert len(row["curves"]["ours"]) == len(row["curves"]["peft"]) == 12
    assert row["largest difference"] < 2e-6  # a few units in the last place
    assert row["curves"]["ours"] != [row["curves"]["ours"][0]] * 12


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")
def test_another_scale_is_seen():
    """The curves are two trainings, and not one twice."""
    model = tiny_llama().requires_grad_(False)
    ids = torch.randint(1, 64, (3, 10))
    twin = TWINS["lora"]._replace(fields={"lora_alpha": 8})
    row = compare(twin, model, [{"input_ids": ids, "labels": ids}] * 6)
    assert row["curves"]["ours"][0] == row["curves"]["peft"][0]
    assert row["largest difference"] > 1e-4
