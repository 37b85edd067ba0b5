"""What the steps of `speed.py` ask of a GPU, counted by the roofline model: kernels and operations.

Both over those of the base. The first is what a step should take where the GPU is busy all the
time, as in a CUDA graph; the second, where it waits for the CPU. No GPU is needed: the steps run on
the device "meta", with the rates that scaling.py measured. `python bench/speed_floor.py`
"""

from __future__ import annotations

import argparse
from typing import Any

import roofline
from common import commit, read, write
from speed import ROWS, Contenders

WAYS = ("eager", "graph", "population")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", default="scaling-h200", help="the results that have them")
    given = parser.parse_args()
    rates = roofline.Rates(**read(given.rates)[0]["rates"])
    options = argparse.Namespace(
        device="meta",
        dtype="bfloat16",
        r=32,
        toy=False,
        peft=False,
        most_layers=32,
        most_tokens=2048,
    )
    rows: list[dict[str, Any]] = []
    for row in ROWS:
        if row.way in WAYS:
            forwards = Contenders(row, options).forwards()
            base, ours = (roofline.predicted(*forwards[who], rates) for who in ("base", "ours"))
            found = {
                "kernels over base": ours.gpu / base.gpu,
                "operations over base": ours.operations / base.operations,
                "flops over base": ours.flops / base.flops,
                "bytes over base": ours.moved / base.moved,
                "mebibytes over base": (ours.peak - base.peak) / 2**20,
            }
            rows.append({**vars(row), "commit": commit(), **found})
            print(*rows[-1].values(), flush=True)
    write("speed-floor", rows, settings=vars(options))


if __name__ == "__main__":
    main()
