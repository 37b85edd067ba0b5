"""Each test meets accelerate as a new process does: its settings are global."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Forgets what the last Trainer chose, such as its precision, as accelerate's own tests do."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
