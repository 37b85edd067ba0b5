"""`python -m bench.sweep` trains; `python -m bench.sweep report RESULTS` makes the report."""

from __future__ import annotations

import os
import sys

import tyro

from .protocol import Sweep

PROG = "python -m bench.sweep"
UNFINISHED = 3  # the exit status of a sweep that stopped in time


def main(arguments: list[str]) -> int:
    """Runs one of the two commands, and returns the exit status."""
    if arguments[:1] == ["report"]:
        from . import report  # noqa: PLC0415  (plots, which training does not need)

        kind = tyro.conf.PositionalRequiredArgs[report.Report]
        report.main(tyro.cli(kind, prog=f"{PROG} report", args=arguments[1:]))
        return 0
    from . import run  # noqa: PLC0415

    options = tyro.cli(Sweep, prog=PROG, args=arguments)
    return 0 if run.main(options) else UNFINISHED


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
