"""Seconds to initialise adapters of all linear layers of an 8B model, beside PEFT's same method.

What a method does at init depends on the shape of a layer alone, so a slow contender is measured on
as many layers of the model as fit into `--seconds`, at least one. The column `layers` says on how
many: nothing is extrapolated. CorDA takes its statistics from one batch, which both sides count.
PEFT's methods rewrite the weights, so PEFT gets a copy of the model, which is not timed. `energy`
is what the start of B spans of one layer's weight, over what the best r directions span.

Second, ways to find the top r singular triplets of one layer: the library's own, and those of
`torch.linalg.svd`. The singular values fall like i^(-1/2), or in a way that is harder.
`python bench/init.py --help`
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import peft
import speed
import torch
from common import peft_config, synchronize, write
from overhead import LINEAR
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor

import lora_func as lf
from lora_func.linalg import top_svd

Triplets = tuple[Tensor, Tensor, Tensor]
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "lora": ("lora", {}, {}),
    "dora": ("dora", {}, {}),
    "olora": ("olora", {}, {}),
    "pissa, niter=1": ("pissa", {"svd": "randomized", "niter": 1}, {"init": "pissa_niter_1"}),
    "pissa, niter=4": ("pissa", {"svd": "randomized", "niter": 4}, {"init": "pissa_niter_4"}),
    "pissa": ("pissa", {}, {}),
    "milora": ("milora", {}, None),
    "ssvd": ("ssvd", {}, None),
    "corda, niter=4": ("corda", {"svd": "randomized", "niter": 4}, None),
    "corda": ("corda", {}, {"init": "corda"}),
}
"""Name -> the variant, its fields, and those of PEFT's config where it has the method."""
PROBED = "model.layers.0.self_attn.q_proj"


def variant_of(name: str, r: int) -> lf.Variant:
    """The variant of a method, of rank r times what is usual for it beside LoRA."""
    kind: Any = lf.VARIANTS[METHODS[name][0]]
    return kind(r=r * kind.card.width, **METHODS[name][1])


class Ours:
    """`lf.adapt`."""

    def __init__(self, name: str, model: Any, batch: dict[str, Tensor], r: int) -> None:
        self.variant, self.model = variant_of(name, r), model
        self.batches = None if self.variant.statistic is None else [batch]

    def __call__(self, layers: int) -> Tensor:
        """Where B of the probed layer starts."""
        names = tuple(rf"\.{name}$" for name in LINEAR)
        targets = lf.Targets(names=names, roles=(), layers=range(layers))
        adapter, params = lf.adapt(
            self.model, self.variant, targets=targets, calibration=self.batches
        )
        both = {**adapter.frozen, **params}
        return both.get(f"{PROBED}.lora_B", both.get(f"{PROBED}.lora_U"))  # pyright: ignore


class Theirs:
    """`get_peft_model`, after what PEFT does with data."""

    def __init__(self, name: str, model: Any, batch: dict[str, Tensor], r: int) -> None:
        self.variant, self.batch = variant_of(name, r), batch
        self.model: Any = model
        self.fields = dict(METHODS[name][2] or {})
        if "init" in self.fields:
            self.fields["init_lora_weights"] = self.fields.pop("init")

    def __call__(self, layers: int) -> Tensor:
        """Where B of the probed layer starts."""
        config = peft_config(
            self.variant, LINEAR, layers_to_transform=list(range(layers)), **self.fields
        )
        if self.variant.statistic is not None:
            config.corda_config = CordaConfig(corda_method="ipm")
            preprocess_corda(self.model, config, run_model=lambda: self.model(**self.batch))
        found = peft.get_peft_model(self.model, config).get_submodule(f"base_model.model.{PROBED}")
        return found.lora_B["default"].weight  # pyright: ignore

    def renewed(self, model: Any) -> None:
        """The next call takes a copy of `model`."""
        self.model = None
        gc.collect()
        self.model = copy.deepcopy(model)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    synchronize()
    start = time.perf_counter()
    out = run()
    synchronize()
    return time.perf_counter() - start, out


def measure(
    name: str, who: str, model: Any, batch: dict[str, Tensor], options: argparse.Namespace
) -> dict[str, Any]:
    """One row."""
    contender = (Ours if who == "ours" else Theirs)(name, model, batch, options.r)
    layers = 1
    while True:
        if isinstance(contender, Theirs):
            contender.renewed(model)
        seconds, started = timed(partial(contender, layers))
        fit = min(options.layers, int(options.seconds / seconds * layers))
        if layers == options.layers or fit < 2 * layers:
            break
        layers = fit
    return {
        "method": name,
        "who": who,
        "layers": layers,
        "seconds": seconds,
        "seconds per layer": seconds / layers,
        "energy": energy(model.get_submodule(PROBED).weight.float(), started.detach().float()),
    }


def energy(W: Tensor, B: Tensor) -> float:
    """The energy of W in the span of B's columns, over the most of as many; B = 0 spans nothing."""
    best = torch.linalg.svdvals(W)[: B.shape[1]]
    Q = torch.linalg.qr(B).Q if B.any() else B
    return ((Q.mT @ W).square().sum() / best.square().sum()).item()


# Ways to the top r singular triplets.


def by_driver(W: Tensor, r: int, driver: str | None) -> Triplets:
    """By one of the algorithms that torch.linalg.svd has: of cuSOLVER, or of LAPACK."""
    U, S, V = torch.linalg.svd(W, full_matrices=False, driver=driver)
    return U[:, :r], S[:r], V[:r]


def ways(r: int, cuda: bool) -> dict[str, Callable[[Tensor], Triplets]]:
    """Name -> a way."""
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Callable[[Tensor], Triplets]] = {
        "top_svd": lambda W: top_svd(W, r),
        "top_svd, niter=4": lambda W: top_svd(W, r, 4, generator),
    }
    for driver in ("gesvdj", "gesvda") if cuda else (None,):
        found[driver or "svd"] = lambda W, driver=driver: by_driver(W, r, driver)
    return found


def spectra(n: int) -> dict[str, Tensor]:
    """Name -> n singular values, in float64."""
    i = torch.arange(n, dtype=torch.float64)
    decaying = (i + 1) ** -0.5
    return {
        "decaying": decaying,
        "steep": 10 ** (-8 * i / n),
        "flat": torch.ones_like(i),
        "of rank n / 10": torch.where(i < n / 10, decaying, 0),
        "three outliers": torch.where(i < 3, 1e4, decaying),
    }


def decompositions(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows: each way on each shape of the model's layers, and on harder spectra of the first."""
    d, ff = (speed.sizes(options)[name] for name in ("hidden_size", "intermediate_size"))
    torch.linalg.svd(torch.eye(64, device=options.device))  # loads the library
    for m, n in ((d, d), (d // 4, d), (ff, d)):
        U, V = (orthonormal(k, min(m, n), options.device) for k in (m, n))
        for spectrum, values in spectra(min(m, n)).items():
            if spectrum != "decaying" and m != d:
                continue
            S = values.to(options.device)
            W = (U * S @ V.mT).float()
            for name, way in ways(min(options.r, len(S)), options.device == "cuda").items():
                row: dict[str, Any] = {"shape": [m, n], "spectrum": spectrum, "way": name}
                try:
                    seconds, found = timed(partial(way, W))
                    if seconds < 1:  # the first run may have loaded a library
                        seconds, found = timed(partial(way, W))
                    yield {**row, "seconds": seconds, **quality(W, S, found)}
                except RuntimeError as error:
                    yield {**row, "error": str(error).partition("\n")[0][:200]}


def orthonormal(m: int, n: int, device: str) -> Tensor:
    """A random `[m, n]` with orthonormal columns, in float64."""
    generator = torch.Generator().manual_seed(m)
    drawn = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn.to(device)).Q


def quality(W: Tensor, S: Tensor, found: Triplets) -> dict[str, float]:
    """The captured energy over the exact, and how far the vectors are from orthonormal."""
    U, values, V = (t.double() for t in found)
    W, r = W.double(), len(values)
    eye = torch.eye(r, device=W.device)
    return {
        "energy": (U.mT @ W).square().sum().item() / S[:r].square().sum().item(),
        "singular values off": (values - S[:r]).abs().max().item() / S[0].item(),
        "U off": (U.mT @ U - eye).abs().max().item(),
        "V off": (V @ V.mT - eye).abs().max().item(),
    }


def contenders(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The method, and who."""
    for name in options.methods:
        yield name, "ours"
        if METHODS[name][2] is not None:
            yield name, "peft"


def main() -> None:
    cuda, began = torch.cuda.is_available(), time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--toy", action="store_true", help="tiny widths, to try the script")
    parser.add_argument("--layers", type=int, default=32 if cuda else 2, help="at most")
    parser.add_argument("--tokens", type=int, default=2048 if cuda else 64, help="for CorDA")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10, help="of one contender, about")
    parser.add_argument("--budget-s", type=float, default=400, help="starts no row after it")
    options = parser.parse_args()
    options.most_layers = options.layers
    shape = speed.Row("8B", options.layers, 1, 1, "eager", "lora", "all linear")
    model = speed.build(shape, options)
    ids = torch.randint(model.config.vocab_size, (1, options.tokens), device=options.device)
    batch = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    rows: dict[str, list[dict[str, Any]]] = {"methods": [], "decompositions": []}
    measured = (measure(*each, model, batch, options) for each in contenders(options))
    for kind, found in (("methods", measured), ("decompositions", decompositions(options))):
        for row in found:
            rows[kind].append(row)
            gc.collect()
            print(*row.values(), flush=True)
            write("init", rows, settings=vars(options))
            if time.monotonic() - began > options.budget_s:
                print("the budget is used up: the rows that follow are left out")
                return


if __name__ == "__main__":
    main()
