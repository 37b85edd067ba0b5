"""The randomized SVD of large layers against the exact one: time, and share of captured energy.

The matrices are 4096 x 4096, and r = 64. One is Gaussian: its spectrum has no decay, which is the
hardest case. The singular values of the other fall like i^(-1/2), roughly as in trained layers.
`python bench/svd.py`
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import interleaved, ratio, write
from torch import Tensor

from lora_func.linalg import randomized_svd, top_svd


def matrix(spectrum: str, n: int, device: str) -> Tensor:
    """A random `[n, n]` with a "flat" or a "decaying" spectrum."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(n, n, generator=generator).to(device) / n**0.5
    if spectrum == "flat":
        return W
    U, _, V = torch.linalg.svd(W)
    return (U * torch.arange(1, n + 1, device=device) ** -0.5) @ V


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    rows: list[dict[str, Any]] = []
    for spectrum in ("decaying", "flat"):
        W = matrix(spectrum, options.n, options.device)
        found: dict[str, Tensor] = {}

        def exact(W: Tensor = W, found: dict[str, Tensor] = found) -> None:
            found["exact"] = top_svd(W, options.r)[1]

        def randomized(niter: int, W: Tensor = W, found: dict[str, Tensor] = found) -> None:
            U, _, _ = randomized_svd(W, options.r, niter, generator)
            found[f"niter={niter}"] = (U.mT @ W).norm(dim=1)  # captured by the subspace

        ways = {"exact": exact, **{f"niter={n}": lambda n=n: randomized(n) for n in (1, 2, 4, 8)}}
        times = interleaved(ways, rounds=options.rounds, warmup=1)
        energy = {way: S.square().sum().item() for way, S in found.items()}
        for way in ways:
            rows.append(
                {
                    "spectrum": spectrum,
                    "way": way,
                    "seconds": sorted(times[way])[len(times[way]) // 2],
                    "times faster": 1 / ratio(times, way, "exact"),
                    "energy": energy[way] / energy["exact"],
                }
            )
            print(rows[-1], flush=True)
    write("svd", rows, settings=vars(options))


if __name__ == "__main__":
    main()
