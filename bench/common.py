"""Shared by all measurements: the record of where they ran, and fair timing side by side."""

from __future__ import annotations

import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

import lora_func as lf
from lora_func.card import TARGETS

RESULTS = Path(__file__).parent / "results"


def of_rank(name: str, r: int) -> lf.Variant:
    """The variant of this name in the catalogue: of rank r, if it has one, and else as it is."""
    kind: Any = lf.VARIANTS[name]
    return kind(r=r) if "r" in kind.__dataclass_fields__ else kind()


def peft_config(variant: lf.Variant, targets: list[str], /, **fields: Any) -> Any:
    """PEFT's config of the same method, rank and scale, as the card names it. It needs PEFT."""
    import peft  # noqa: PLC0415  (of three measurements)

    known, own = variant.card.peft, {"target_modules": targets}
    assert known is not None, f"PEFT has no {variant.name()}"
    r: Any = getattr(variant, "r", None)
    if known.rank is not None:
        own[known.rank] = r
    if known.config == "LoraConfig":
        own["lora_alpha"] = getattr(variant, "scale", 1.0) * r
    own |= {name: targets if value == TARGETS else value for name, value in known.fields.items()}
    return getattr(peft, known.config)(**{**own, **fields})


def where() -> dict[str, str]:
    """Device, versions and commit, for every file of results."""
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    found = {name: version for name in packages if (version := version_of(name))}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU, {os.cpu_count()} cores"
    return {"device": device, "commit": commit(), "python": platform.python_version(), **found}


def read(name: str) -> tuple[dict[str, Any], str]:
    """`(results, where they were measured)`."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    where = result["where"]
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    versions = ", ".join(f"{name} {where[name]}" for name in packages if name in where)
    rows = result["rows"] if isinstance(result["rows"], list) else result["rows"]["methods"]
    commits = dict.fromkeys(row.get("commit", where["commit"]) for row in rows)
    said = f"commit {where['commit']}" if len(commits) < 2 else f"commits {', '.join(commits)}"
    ran_on = f"{where['device']}; {versions}; {said}"
    return result, ran_on


def version_of(package: str) -> str | None:
    """None if the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the working tree, or LORA_FUNC_COMMIT on a machine without the history."""
    if given := os.environ.get("LORA_FUNC_COMMIT"):
        return given
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def write(name: str, rows: Any, **about: Any) -> Path:
    """Writes `<name>-<cpu or the GPU>.json` into the folder OUT, by default bench/results."""
    kind = torch.cuda.get_device_name().split()[1].lower() if torch.cuda.is_available() else "cpu"
    folder = Path(os.environ.get("OUT", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{kind}.json"
    text = json.dumps({"where": where(), **about, "rows": rows}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path


def qwen3(layers: int, device: str, dtype: torch.dtype, **changes: Any) -> Any:
    """A frozen Qwen3ForCausalLM with random weights, in the shape of Qwen3-0.6B.

    `layers` is their number, and `changes` are other fields of the config.
    """
    sizes = {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    config = Qwen3Config(num_hidden_layers=layers, tie_word_embeddings=True, **{**sizes, **changes})
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = Qwen3ForCausalLM(config)
    return nn.Module.to(model, dtype).eval().requires_grad_(False)


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def repeated(run: Callable[[], Any], times: int) -> Callable[[], None]:
    """`run`, several times, without a wait for the device between them."""

    def all_of_them() -> None:
        for _ in range(times):
            run()

    return all_of_them


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round.

    Every round runs all of them, one after the other, so that a busy machine is fair to all.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, run in contenders.items():
            synchronize()
            start = clock()
            run()
            synchronize()
            if turn >= warmup:
                times[name].append(clock() - start)
    return times


def replayed(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()

    def replay() -> Any:
        graph.replay()
        return held

    return replay


def ratio(times: Mapping[str, list[float]], of: str, to: str) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times[of], times[to]))


def peak_bytes(run: Callable[[], Any]) -> int:
    """The bytes that a step takes.

    On CUDA: the peak beyond the memory allocated before. On the CPU: the bytes that autograd saves
    for backward, each storage once.
    """
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    storages: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            storages[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(size for size, _ in storages.values())


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that are allocated at a time while `run` runs, beyond those before it."""
    if torch.cuda.is_available():
        return peak_bytes(run)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return max(itertools.accumulate((size for _, size in changes), initial=0))
