"""`python -m bench.sweep` trains; `python -m bench.sweep report` makes the report."""

from __future__ import annotations

import os
import sys

import tyro

from . import run
from .protocol import Sweep

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:]
    sys.exit(0 if run.main(tyro.cli(Sweep, prog="python -m bench.sweep", args=arguments)) else 3)
