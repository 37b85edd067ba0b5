"""Hypothesis profiles, one thread per worker, and data that lies outside of the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("ci", max_examples=20, derandomize=True, **slow)
settings.register_profile("soak", max_examples=500, **slow)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Workers run side by side; more threads than cores only slow each other down."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """Tests that draw without a generator draw the same each time, whatever ran before them."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """The GSM8K question/answer files, which lie beside the project and are no part of it."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
    if not (folder / "train.jsonl").is_file():
        # A lone checkout has none: the data is not ours to copy. Other tests read lines of our own.
        pytest.skip(f"needs GSM8K as train.jsonl in {folder}")
    return folder
