"""Hypothesis profiles, one thread per worker, and what lies outside of this folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from effort import EXAMPLES, SUMMARY
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path += [
    str(Path(__file__).parents[1] / "bench"),
    str(Path(__file__).parents[1] / "docs" / "examples"),
    str(Path(__file__).parents[1]),
]  # for tests of its modules

slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("ci", max_examples=EXAMPLES, derandomize=True, **slow)
# New examples in each run, but on CI those of the commit: it must not fail another one's.
settings.register_profile("soak", max_examples=EXAMPLES, derandomize="CI" in os.environ, **slow)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_report_header() -> str:
    """How far this run goes."""
    return f"effort: {SUMMARY}"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Workers run side by side. More threads than cores slow each other down."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """A test that draws without a generator draws the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """The folder with GSM8K's questions and answers, beside the project and no part of it."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
    if not (folder / "train.jsonl").is_file():
        # A lone checkout has none: the data is not ours to copy. Other tests read lines of our own.
        pytest.skip(f"needs GSM8K as train.jsonl in {folder}")
    return folder


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """The home of a hub that has tiny models under the names that the pages use."""
    import pages  # noqa: PLC0415  # it imports transformers, which few tests need

    home = tmp_path_factory.mktemp("hub")
    pages.fill(home / "hub")
    return home
