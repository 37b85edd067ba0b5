"""FSDP2: a base that two processes share the weights of. The laws are in distributed_worker.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "docs" / "examples" / "fsdp.py"


def two_ranks(script: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        *args,
    ]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_laws(tmp_path):
    """Gradients, init, merge, files, transforms and generate are those of the base in one process."""
    run = two_ranks(HERE / "distributed_worker.py", str(tmp_path))
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-3000:]


def test_example():
    """It prints the loss and the memory of each rank, and asserts that the loss fell."""
    run = two_ranks(EXAMPLE, "--variant", "DoRA", "--steps", "3")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "rank 0" in run.stdout
    assert "rank 1" in run.stdout
