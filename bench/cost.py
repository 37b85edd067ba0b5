"""Every variant of the catalogue: its time and memory over the frozen base, and beside PEFT's.

The model is a stack of linear layers in the shapes of a transformer's, all of them adapted. A step
is a forward and a backward to the input (the base's whole work), and to the adapter if there is
one; `forward` is that alone, without gradients. The contenders of a variant run interleaved in one
process. On the CPU that is one thread, and the clock is its own time, so that other work on the
machine does not count. On a GPU a round is several steps, launched as a training loop launches
them: without a wait for the device between them. Memory is the peak of a step beyond what was
allocated before it.

Both sides have the same rank, sizes of blocks and the like, and PEFT's defaults where it has no
rank. PEFT's methods that are LoRA from another start, such as PiSSA, start as LoRA here: it is the
same step. What a side cannot run is written down as text. `python bench/cost.py --help`
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import peft
import torch
import torch.nn.functional as F
from common import interleaved, peak, peft_config, ratio, repeated, write
from torch import Tensor, nn

import lora_func as lf

LAYERS = ["square", "up", "down"]
TARGETS = lf.Targets(names=(rf"\.({'|'.join(LAYERS)})$",), roles=())
# Fields of ours and of PEFT's config, where the defaults of the two are not the same method.
FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "eva": ({"rho": 1.0}, {}),
    "oft": ({}, {"use_cayley_neumann": False}),
    "oft, terms=5": ({"terms": 5}, {}),
    "boft": ({"m": 1}, {"boft_block_size": 8}),  # PEFT's m > 1 needs a compiler
    'vblora, start="peft"': ({"start": "peft"}, {}),
}


def contenders() -> list[str]:
    """Names of the rows. Those that need data come last: some take minutes on large layers."""
    forms = [name for name in FIELDS if name not in lf.VARIANTS]
    names = [own for name in lf.VARIANTS for own in (name, *forms) if kind_of(own) == name]
    return sorted(names, key=lambda name: lf.VARIANTS[kind_of(name)].card.data == "required")


def kind_of(name: str) -> str:
    """The name in the catalogue."""
    return name.partition(",")[0]


def variant_of(name: str, r: int) -> lf.Variant:
    """The variant of a row, of rank r times what is usual for it beside LoRA."""
    kind: Any = lf.VARIANTS[kind_of(name)]
    rank = {"r": r * kind.card.width} if "r" in kind.__dataclass_fields__ else {}
    return kind(**rank, **FIELDS.get(name, ({}, {}))[0])


class Block(nn.Module):
    """Linear layers as in a transformer, without the attention between them."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.square = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1:]
        x = x + self.square(F.rms_norm(x, size))
        return x + self.down(F.silu(self.up(F.rms_norm(x, size))))


def stack(options: argparse.Namespace) -> nn.Sequential:
    """A frozen model: the same random block several times."""
    torch.manual_seed(0)
    with torch.device(options.device):
        block = Block(options.hidden, options.width).to(getattr(torch, options.dtype))
    block.requires_grad_(False)
    return nn.Sequential(*(copy.deepcopy(block) for _ in range(options.blocks)))


def stats_of(variant: lf.Variant, model: nn.Module, x: Tensor) -> dict[str, Any] | None:
    """What the variant's init needs to know of each layer, if anything."""
    if variant.card.data != "required":
        return None
    if variant.statistic is not None:
        loss = {}
        if variant.statistic.observes == "gradients":
            loss = {"loss": lambda out, batch: out.float().square().mean()}
        return lf.collect(model, TARGETS, [x], variant.statistic, progress=False, **loss)
    layers: Any = {path: model.get_submodule(path) for path in TARGETS.find(model)}
    generator = torch.Generator(x.device)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator.manual_seed(0), device=x.device)

    if isinstance(variant, lf.LoftQ):  # as if each entry had lost some 10 %
        weights = {path: layer.weight for path, layer in layers.items()}
        return {path: W * (1 + 0.1 * noise(*W.shape)) for path, W in weights.items()}
    return {path: noise(layer.out_features) for path, layer in layers.items()}


def ours(
    variant: lf.Variant, model: nn.Module, x: Tensor
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The forward with our adapter, and what it trains."""
    generator, stats = torch.Generator(x.device).manual_seed(0), stats_of(variant, model, x)
    adapter, params = lf.adapt(model, variant, targets=TARGETS, generator=generator, stats=stats)
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    return lambda: adapter(model, leaves, x), list(leaves.values())


def theirs(
    name: str, variant: lf.Variant, model: nn.Module, x: Tensor
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The forward with PEFT's adapter, and what it trains."""
    fields = dict(FIELDS.get(name, ({}, {}))[1])
    if "init_lora_weights" in variant.card.peft.fields:  # pyright: ignore  (PEFT has it)
        fields["init_lora_weights"] = True
    config = peft_config(variant, LAYERS, **fields)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).to(x.device)  # pyright: ignore
    return lambda: adapted(x), [p for p in adapted.parameters() if p.requires_grad]


@contextlib.contextmanager
def decomposed_once(found: dict[Any, Any]) -> Iterator[None]:
    """Keeps each SVD and eigendecomposition in `found`. Blocks and variants share the weights."""

    def kept(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(A: Tensor, **options: Any) -> Any:
            sums = A.sum().item(), A.square().sum().item()
            key = function, A.shape, A.dtype, *options.items(), *sums
            if key not in found:
                found[key] = function(A, **options)
            return found[key]

        return call

    svd, eigh = torch.linalg.svd, torch.linalg.eigh
    with mock.patch.multiple(torch.linalg, svd=kept(svd), eigh=kept(eigh)):
        yield


def measure(name: str, model: nn.Module, found: dict, options: argparse.Namespace) -> dict:
    """One row."""
    variant, dtype = variant_of(name, options.r), getattr(torch, options.dtype)
    x = torch.randn(options.batch, options.tokens, options.hidden, device=options.device)
    x = x.to(dtype).requires_grad_()
    toward = torch.randn_like(x)
    makers = {"base": lambda: (lambda: model(x), []), "ours": lambda: ours(variant, model, x)}
    if variant.card.peft is not None:
        makers["peft"] = lambda: theirs(name, variant, model, x)
    steps, forwards, peaks, trained, errors = {}, {}, {}, {}, {}
    for who, make in makers.items():
        try:
            with decomposed_once(found):
                call, leaves = make()

            def step(call=call, own=(x, *leaves)) -> None:
                torch.autograd.grad(call(), own, toward, allow_unused=True)

            step()
            peaks[who] = peak(step) / 2**20
            trained[who] = sum(leaf.numel() for leaf in leaves)
            steps[who], forwards[who] = step, torch.no_grad()(call)
        except Exception as error:  # of whatever kind: it is part of the result
            errors[who] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        free()
    runs = {"step": steps, "forward": forwards}
    times = {what: timed(own, options) for what, own in runs.items()}
    row: dict[str, Any] = {"variant": name, "r": getattr(variant, "r", None), "errors": errors}
    row["trainable"] = trained
    for what, taken in times.items():
        row[what] = {
            "milliseconds": {
                who: 1e3 * statistics.median(seconds) / options.in_a_row
                for who, seconds in taken.items()
            },
            "over base": {who: ratio(taken, who, "base") for who in taken if who != "base"},
            "seconds of each round": taken,
        }
        if {"ours", "peft"} <= taken.keys():
            row[what]["ours over peft"] = ratio(taken, "ours", "peft")
    row["mebibytes over base"] = {who: size - peaks["base"] for who, size in peaks.items()}
    row["mebibytes"] = peaks
    return row


def timed(
    runs: dict[str, Callable[[], Any]], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each round, of as many rounds as fit into the time for a row, at least three."""
    loops = {who: repeated(run, options.in_a_row) for who, run in runs.items()}
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    first = sum(itertools.chain(*interleaved(loops, 1, 1, clock).values()))
    rounds = max(3, min(options.rounds, int(options.seconds / first)))
    return interleaved(loops, rounds, 1, clock)


def free() -> None:
    """Gives memory back that an earlier contender took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shown(row: dict[str, Any]) -> str:
    """A row in a line."""
    parts = [f"{row['variant']:22s}"]
    for what in ("step", "forward"):
        over = ", ".join(f"{who} {x:.2f}" for who, x in row[what]["over base"].items())
        parts.append(f"{what} {over} ({row[what].get('ours over peft', float('nan')):.2f})")
    sizes = row["mebibytes over base"]
    parts.append("MiB " + ", ".join(f"{who} {x:.1f}" for who, x in sizes.items() if who != "base"))
    parts += [f"{who}: {error}" for who, error in row["errors"].items()]
    return "  ".join(parts)


def main() -> None:
    cuda, names = torch.cuda.is_available(), contenders()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="*", default=names, help="default: all")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--blocks", type=int, default=2, help="of three layers")
    parser.add_argument("--hidden", type=int, default=4096 if cuda else 512)
    parser.add_argument("--width", type=int, default=14336 if cuda else 1792)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048 if cuda else 256)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30 if cuda else 15)
    parser.add_argument("--in-a-row", type=int, default=4 if cuda else 1, help="steps of a round")
    parser.add_argument("--seconds", type=float, default=3, help="for the rounds of a row")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="peft")
    model, found = stack(options), {}
    rows, begin = [], time.perf_counter()
    for name in options.variants:
        rows.append(measure(name, model, found, options))
        print(f"{time.perf_counter() - begin:4.0f} s  {shown(rows[-1])}", flush=True)
        write("cost", rows, settings=vars(options))


if __name__ == "__main__":
    main()
