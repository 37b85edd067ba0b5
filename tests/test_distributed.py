"""FSDP2: two processes share the weights of a base. The laws are in distributed_worker.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "docs" / "examples" / "fsdp.py"


def two_ranks(script: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in two processes."""
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*run, str(script), *args],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_laws(tmp_path):
    """All results equal those of one process with the whole base."""
    run = two_ranks(HERE / "distributed_worker.py", str(tmp_path))
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-3000:]


def test_example():
    """It prints the loss and the memory of each rank, and asserts that the loss falls."""
    run = two_ranks(EXAMPLE, "--variant", "DoRA", "--steps", "3")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "rank 0" in run.stdout
    assert "rank 1" in run.stdout
