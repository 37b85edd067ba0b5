"""The sweep: every group through its grid, its best learning rate through the tests."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import lora_func as lf

from ..common import where
from . import evaluate, files, model
from .data import Data, batch, load
from .protocol import ALL_LINEAR, Group, Sweep, extension, first_grid, groups
from .train import OutOfTime, Pass, Trained, train

BYTES = 30  # of one parameter of a member: leaf, gradient, AdamW's two, and what a step needs


@dataclasses.dataclass
class Job:
    """What all groups of one run share."""

    options: Sweep
    base: model.Answers
    tokenizer: Any
    data: Data
    results: files.Results
    run: int
    in_time: Callable[[], bool]


def main(options: Sweep, base: model.Answers | None = None, tokenizer: Any = None) -> bool:
    """Trains what is missing in the results; returns whether all is done.

    `base` and `tokenizer`: in the place of those that the options name.
    """
    started = time.monotonic()
    results = files.Results(options.out / "results.jsonl")
    run = results.begin(options.decides(), where())
    if base is None:
        base, tokenizer, name = model.load(options.model, options.device, options.quantization)
        print(f"model: {name}", flush=True)
    job = Job(
        options,
        base,
        tokenizer,
        load(tokenizer, options),
        results,
        run,
        lambda: time.monotonic() - started < options.budget_s,
    )
    todo = groups(options, base)
    try:
        test_base(job)
        for group in (progress := tqdm(todo, unit="group")):
            progress.set_description(group.key[:60])
            run_group(job, group)
    except OutOfTime:
        done = sum(bool(results.of("test", group.key)) for group in todo)
        print(
            f"time is over after {done} of {len(todo)} groups; the same command goes on from here"
        )
        return False
    print(f"all {len(todo)} groups are done: {results.path}")
    return True


def test_base(job: Job) -> None:
    """The rows of the untrained base."""
    key = f"base|{job.options.quantization}"
    if not job.results.of("base", key):
        row = {
            "kind": "base",
            "run": job.run,
            "group": key,
            **tests(job, None, {}, validation=True),
        }
        job.results.add(row)
    if not_solved(job, key):
        solve(job, key, None, {})


def tests(
    job: Job, adapter: lf.Adapter | None, leaves: dict[str, Tensor], validation: bool
) -> dict[str, Any]:
    """What is reported of the members of the chosen learning rate, a list over seeds each."""
    data, found = job.data, {}
    if validation:
        nats = evaluate.losses(job.base, adapter, leaves, data.validation)
        found["validation"] = evaluate.per_token(nats, data.validation)
    nats = evaluate.losses(job.base, adapter, leaves, data.test)
    found["test"] = evaluate.per_token(nats, data.test)
    found["problems"] = [[round(x, 2) for x in member] for member in nats.tolist()]
    found["answer_tokens"] = [int(n) for n in evaluate.answer_tokens(data.test)]
    text = evaluate.losses(job.base, adapter, leaves, data.text)
    found["text"] = evaluate.per_token(text, data.text)
    return found


def not_solved(job: Job, group: str) -> bool:
    """Whether answers are to be generated that are not there."""
    return bool(job.options.generate) and not job.results.of("solved", group)


def solve(job: Job, group: str, adapter: lf.Adapter | None, leaves: dict[str, Tensor]) -> None:
    """Writes the row of the problems that each seed solves."""
    n, row = job.options.generate, {"kind": "solved", "run": job.run, "group": group}
    for name, problems in (("gsm8k", job.data.test[:n]), ("arithmetic", job.data.arithmetic[:n])):
        right = evaluate.solved(job.base, adapter, leaves, problems, job.tokenizer)
        row[f"solved {name}"] = {"of": len(problems), "right": right}
    job.results.add(row)


def run_group(job: Job, group: Group) -> None:
    """Trains, chooses and tests one group, as far as that is not done."""
    tested = bool(job.results.of("test", group.key))
    if tested and not not_solved(job, group.key):
        return
    search = Search(job, group)
    if not tested:
        search.grid(first_grid(job.options, group.variant))
        for _ in range(job.options.extensions):
            if not (more := extension(search.losses)):
                break
            search.grid(more)
    best = min(search.losses, key=lambda lr: search.losses[lr])
    leaves = search.leaves_of(best)
    if not tested:
        row = {
            "kind": "test",
            "run": job.run,
            "group": group.key,
            "lr": best,
            "at_end": bool(extension(search.losses)),
            "file_bytes": size_of_file(job.options.out, search.adapter, leaves),
            **tests(job, search.adapter, leaves, validation=False),
        }
        job.results.add(row)
    if not_solved(job, group.key):
        solve(job, group.key, search.adapter, leaves)
    search.best_file.unlink(missing_ok=True)


class Search:
    """The passes of one group: learning rates, their losses, and the leaves of the best."""

    def __init__(self, job: Job, group: Group):
        self.job, self.group = job, group
        started = time.monotonic()
        variant, stats = group.variant, None
        if variant.statistic is not None:
            stats = lf.collect(job.base, group.targets, calibration(job), variant.statistic)
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        self.adapter, params = lf.adapt(
            job.base, variant, targets=group.targets, generator=generator, stats=stats
        )
        # What draws nothing starts all seeds alike: no need to decompose the weights for each.
        drawn = not torch.equal(before, generator.get_state())
        self.starts = [
            self.adapter.init(job.base, generator=torch.Generator().manual_seed(seed), stats=stats)
            if drawn
            else params
            for seed in range(job.options.seeds)
        ]
        self.setup_s = time.monotonic() - started
        self.best_file = job.options.out / "state" / f"{group.file}.best"
        self.losses: dict[float, float] = {}
        for row in job.results.of("pass", group.key):
            self.losses |= means(row)

    def grid(self, lrs: tuple[float, ...]) -> None:
        """Trains the members of these learning rates that are not trained, as many as fit."""
        missing = [lr for lr in lrs if lr not in self.losses]
        parameters = sum(shape.numel() for shape in self.adapter.shapes.values())
        fitting = int(self.job.options.memory_gb * 1e9 / (BYTES * parameters))
        at_once = max(1, (self.job.options.members or fitting) // self.job.options.seeds)
        for i in range(0, len(missing), at_once):
            self.halving(tuple(missing[i : i + at_once]))

    def halving(self, lrs: tuple[float, ...]) -> None:
        """One pass, or two of half the size if it runs out of memory."""
        try:
            self.one(lrs)
            return
        except torch.OutOfMemoryError:
            if len(lrs) == 1:
                raise
        torch.cuda.empty_cache()
        self.halving(lrs[: len(lrs) // 2])
        self.halving(lrs[len(lrs) // 2 :])

    def one(self, lrs: tuple[float, ...]) -> None:
        """Trains a pass, writes its row, and keeps the leaves of the best learning rate so far."""
        job, done, state = self.job, self.train(lrs), self.state(lrs)
        data = job.data.validation
        validation = evaluate.per_token(
            evaluate.losses(job.base, self.adapter, done.population.leaves, data), data
        )
        alive, seeds = done.population.alive.tolist(), job.options.seeds
        row: dict[str, Any] = {
            "kind": "pass",
            "run": job.run,
            "group": self.group.key,
            **describe(self.group, self.adapter),
            "lrs": lrs,
            "seeds": seeds,
            "validation": [finite(x) if ok else None for x, ok in zip(validation, alive)],
            "curves": coarse(done.curves),
            "seconds": round(done.seconds, 3),
            "setup_s": round(self.setup_s, 3),
            "peak_bytes": done.peak_bytes,
        }
        self.losses |= means(row)
        best = min(self.losses, key=lambda lr: self.losses[lr])
        if best in lrs:
            self.keep(done, lrs.index(best))
        job.results.add(row)
        state.unlink(missing_ok=True)

    def train(self, lrs: tuple[float, ...]) -> Trained:
        """One pass."""
        job, options = self.job, self.job.options
        train_pass = Pass(
            adapter=self.adapter,
            starts=self.starts,
            lrs=lrs,
            problems=job.data.train,
            steps=options.steps,
            batch=options.batch,
            state=self.state(lrs),
            save_s=options.save_s,
            in_time=job.in_time,
        )
        return train(job.base, train_pass)

    def state(self, lrs: tuple[float, ...]) -> Path:
        """Where an unfinished pass is saved."""
        rates = f"{lrs[0]:g}-{lrs[-1]:g}-{len(lrs)}"
        return self.job.options.out / "state" / f"{self.group.file}.{rates}"

    def keep(self, done: Trained, index: int) -> None:
        """Keeps the seeds of a learning rate, the `index`-th of a pass."""
        seeds = self.job.options.seeds
        flat = done.population.flat[index * seeds : (index + 1) * seeds]
        files.save_state(self.best_file, done.population.named(flat))

    def leaves_of(self, lr: float) -> dict[str, Tensor]:
        """The leaves `[seeds, ..]` of the best learning rate. Trains it again if they are lost."""
        if not self.best_file.exists():
            self.keep(self.train((lr,)), 0)
            self.state((lr,)).unlink(missing_ok=True)
        return files.load_state(self.best_file, next(self.job.base.parameters()).device)


def calibration(job: Job) -> list[dict[str, Any]]:
    """The same 32 problems for every variant that starts from data."""
    device = next(job.base.parameters()).device
    batches = []
    chosen = job.data.train[:32]
    for i in range(0, len(chosen), 4):
        rows = chosen[i : i + 4]
        given = batch([rows], [0], device)
        T = given["ids"].shape[1] // len(rows)
        lengths = torch.tensor([len(row.tokens) for row in rows], device=device)
        mask = (torch.arange(T, device=device) < lengths[:, None]).long().view(1, -1)
        batches.append({**given, "attention_mask": mask})
    return batches


def describe(group: Group, adapter: lf.Adapter) -> dict[str, Any]:
    """What a reader of a row needs to know of its group."""
    fields = dataclasses.asdict(group.variant)
    return {
        "set": group.set,
        "variant": group.variant.name(),
        "fields": fields,
        "layers": "all-linear" if group.layers == ALL_LINEAR else list(group.layers),
        "adapted": len(adapter.targets),
        "quantization": group.quantization,
        "parameters": sum(shape.numel() for shape in adapter.shapes.values()),
    }


def means(row: dict[str, Any]) -> dict[float, float]:
    """learning rate -> validation loss, the mean over seeds; infinite if one diverged."""
    seeds, found = row["seeds"], {}
    for i, lr in enumerate(row["lrs"]):
        own = row["validation"][i * seeds : (i + 1) * seeds]
        found[lr] = math.inf if None in own else statistics.fmean(own)
    return found


def coarse(curves: Tensor, points: int = 16) -> list[list[float | None]]:
    """The training loss of each member, in `points` means. None: not finite."""
    parts = curves.double().tensor_split(min(points, len(curves)))
    table = torch.stack([part.mean(0) for part in parts], dim=1)
    return [[finite(round(x, 4)) for x in member] for member in table.tolist()]


def finite(x: float) -> float | None:
    """JSON has no infinity."""
    return x if math.isfinite(x) else None


def size_of_file(folder: Path, adapter: lf.Adapter, leaves: dict[str, Tensor]) -> int:
    """Bytes of one member's file."""
    path = folder / "adapter.safetensors"
    lf.save(path, adapter, {key: leaf[0] for key, leaf in leaves.items()})
    size = path.stat().st_size
    path.unlink()
    return size
