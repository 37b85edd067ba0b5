"""The sweep of the catalogue: members equal separate runs, a kill changes nothing, grids grow."""

from __future__ import annotations

import copy
import dataclasses
import html
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from models import largest, tiny_llama
from transformers import PreTrainedTokenizerFast

import lora_func as lf
from bench.sweep import data, evaluate, files, protocol, report, results, run, train
from bench.sweep.__main__ import main as command
from bench.sweep.model import Answers, fuse_norms
from bench.sweep.protocol import Sweep

WORDS = ["<unk>", "</s>", "Question:", "Answer:", *map(str, range(20)), *"abcdefghijklmnopqrst"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


def base(**sizes: int) -> Answers:
    torch.manual_seed(0)
    return Answers(tiny_llama(**sizes).requires_grad_(False))


def made(folder: Path, count: int = 40) -> Path:
    """Problems of different lengths."""
    folder.mkdir(exist_ok=True)
    for name in ("train", "test"):
        rows = []
        for i in range(count):
            letters = " ".join("abcdefghijklmnopqrst"[(i * 7 + j) % 20] for j in range(1 + i % 5))
            answer = " ".join(str((i + j) % 20) for j in range(1 + i % 3))
            rows.append(json.dumps({"question": letters, "answer": answer}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


def options(tmp_path: Path, **changes) -> Sweep:
    settings = {
        "data": made(tmp_path / "data"),
        "out": tmp_path / "out",
        "variants": ("lora",),
        "sets": ("configured",),
        "r": 2,
        "grid": (1e-3, 1e-2),
        "extensions": 0,
        "seeds": 2,
        "steps": 6,
        "batch": 2,
        "length": 16,
        "validation": 6,
        "test": 8,
        "text": 3,
        "device": "cpu",
    }
    return Sweep(**{**settings, **changes})


def problems(tmp_path: Path) -> list[data.Problem]:
    return data.encode(word_tokenizer(), data.read(made(tmp_path), "train.jsonl"), 16)


def alone(base, start, lr, seed, job) -> dict[str, torch.Tensor]:
    """One member, trained by torch's AdamW on batches that transformers sees as usual."""
    adapter, lm = job.adapter, copy.deepcopy(base.lm)
    lm.set_attn_implementation("sdpa")
    leaves = {key.removeprefix("lm."): t.clone().requires_grad_() for key, t in start.items()}
    variants = {path.removeprefix("lm."): v for path, v in adapter.variants.items()}
    own, _ = lf.adapt(
        lm,
        next(iter(variants.values())),
        targets=lf.Targets(names=tuple(f"^{path}$" for path in variants)),
        generator=torch.Generator().manual_seed(0),
    )
    scale = own.lr_scale
    groups = [{"params": [leaf], "lr": lr * scale[key]} for key, leaf in leaves.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: train.factor(step, job.steps)
    )
    plan = data.orders([len(p.tokens) for p in job.problems], job.steps, job.batch, 2)
    for step in range(job.steps):
        chosen = [job.problems[i] for i in plan[seed, step].tolist()]
        longest = max(len(p.tokens) for p in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, p in enumerate(chosen):
            ids[i, : len(p.tokens)] = torch.tensor(p.tokens)
            labels[i, p.start : len(p.tokens)] = torch.tensor(p.tokens[p.start :])
            mask[i, : len(p.tokens)] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        optimizer.zero_grad()
        own(lm, leaves, batch).loss.backward()
        optimizer.step()
        schedule.step()
    return {key: leaves[key.removeprefix("lm.")].detach() for key in start}


def job_of(base, variant, tmp_path, lrs=(1e-2, 1e-3), **changes) -> train.Pass:
    targets = lf.Targets(names=variant.card.layers)
    generator = torch.Generator().manual_seed(0)
    adapter, _ = lf.adapt(base, variant, targets=targets, generator=generator)
    starts = [adapter.init(base, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    settings = {"problems": problems(tmp_path), "steps": 5, "batch": 3, "state": tmp_path / "state"}
    return train.Pass(adapter=adapter, starts=starts, lrs=lrs, **{**settings, **changes})


@pytest.mark.parametrize(
    "variant",
    [
        lf.LoRA(r=2, lr_ratio=4.0),
        lf.DoRA(r=2),
        lf.HRA(r=2),
        lf.VBLoRA(r=2, num_vectors=6, vector_length=2),
        lf.Full(),
    ],
    ids=lambda v: v.name(),
)
def test_members_equal_separate_runs(variant, tmp_path):
    """Learning rates x seeds in one pass end where torch's AdamW ends with each alone.

    In float64: what remains is the order of sums.
    """
    model = base().double()
    job = job_of(model, variant, tmp_path)
    job.starts = [{key: t.double() for key, t in start.items()} for start in job.starts]
    done = train.train(model, job)
    together = lf.unstack(done.population.leaves)
    for k, (lr, seed) in enumerate(job.members):
        expected = alone(model, job.starts[seed], lr, seed, job)
        assert largest(together[k], expected) < 1e-9
        assert largest(expected, job.starts[seed]) > 1e-4  # it learned something


def test_a_member_that_diverges_does_not_touch_the_others(tmp_path):
    model = base()
    both = train.train(model, job_of(model, lf.LoRA(r=2), tmp_path, lrs=(1e-3, math.inf)))
    one = train.train(model, job_of(model, lf.LoRA(r=2), tmp_path, lrs=(1e-3,)))
    assert both.population.alive.tolist() == [True, True, False, False]
    assert torch.equal(both.population.flat[:2], one.population.flat)
    assert both.population.flat.isfinite().all()


def test_examples_of_a_row_do_not_see_each_other(tmp_path):
    """The loss of each example is that of transformers, on the example alone."""
    model, chosen = base(), problems(tmp_path)[:5]
    lm = copy.deepcopy(model.lm)
    lm.set_attn_implementation("sdpa")
    found = evaluate.losses(model, None, {}, chosen)[0]
    for p, nats in zip(chosen, found.tolist()):
        ids = torch.tensor([p.tokens])
        labels = ids.clone()
        labels[:, : p.start] = -100
        loss = lm(input_ids=ids, labels=labels).loss * (len(p.tokens) - p.start)
        assert nats == pytest.approx(loss.item(), rel=1e-5)


def test_fused_norms_are_the_models_norms():
    model = tiny_llama()
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    fuse_norms(model)
    assert sum(type(m) is torch.nn.RMSNorm for m in model.modules()) == 5
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def rows_of(folder: Path, *without: str) -> list[dict]:
    """The results, but for what no two runs share."""
    rows = files.read_rows(folder / "results.jsonl")
    drop = {"where", "seconds", "setup_s", "run", *without}
    return [{k: v for k, v in row.items() if k not in drop} for row in rows if row["kind"] != "run"]


def test_stopped_at_every_step_it_ends_the_same(tmp_path):
    """A budget of no time at all makes one step a run. The results are those of one run."""
    whole = options(tmp_path, variants=("lora", "ia3"), out=tmp_path / "whole")
    assert run.main(whole, base(), word_tokenizer())
    pieces = dataclasses.replace(whole, out=tmp_path / "pieces", budget_s=0.02)
    runs = 1
    while not run.main(pieces, base(), word_tokenizer()):
        runs += 1
        assert runs < 200
    assert runs > 3
    assert rows_of(tmp_path / "pieces") == rows_of(tmp_path / "whole")
    assert not list((tmp_path / "pieces" / "state").iterdir())


KILLED = """
import os, sys, signal
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/bench"]
from pathlib import Path
import test_sweep
from bench.sweep import files, run, train
torch = test_sweep.torch
torch.set_num_threads(1)
written = 0
def dying(write):
    def then_die(*args):
        global written
        write(*args)
        written += 1
        if written == {after}:
            os.kill(os.getpid(), signal.SIGKILL)
    return then_die
files.save_state = dying(files.save_state)
files.Results.add = dying(files.Results.add)
options = test_sweep.options(Path({folder!r}), save_s=0.0)
run.main(options, test_sweep.base(), test_sweep.word_tokenizer())
"""


@pytest.mark.parametrize("after", [4, 10])  # in a pass; after its row
def test_killed_it_ends_the_same(after, tmp_path):
    whole = options(tmp_path, out=tmp_path / "whole")
    assert run.main(whole, base(), word_tokenizer())
    root = str(Path(__file__).parents[1])
    script = KILLED.format(root=root, after=after, folder=str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", script], check=False, env={**os.environ})
    assert killed.returncode == -9
    results = tmp_path / "out" / "results.jsonl"
    with open(results, "a") as file:
        file.write('{"kind": "pass", "group"')  # and in the middle of a line
    assert run.main(options(tmp_path), base(), word_tokenizer())
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")


def test_other_settings_do_not_mix(tmp_path):
    assert run.main(options(tmp_path), base(), word_tokenizer())
    with pytest.raises(lf.LoraFuncError, match=r"was begun with \{'steps': 6\}"):
        run.main(options(tmp_path, steps=7), base(), word_tokenizer())


def test_the_grid_grows_until_the_best_is_inside(tmp_path):
    """From two rates that are far too small, to a minimum with a rate on both sides."""
    wanted = options(tmp_path, grid=(1e-6, 3.16e-6), extensions=8, steps=10)
    assert run.main(wanted, base(), word_tokenizer())
    rows = rows_of(tmp_path / "out")
    lrs = sorted(lr for row in rows if row["kind"] == "pass" for lr in row["lrs"])
    (test,) = [row for row in rows if row["kind"] == "test"]
    assert lrs[0] < test["lr"] < lrs[-1]
    assert not test["at_end"]
    assert len(lrs) > 6
    (start,) = [row for row in rows if row["kind"] == "base"]
    assert test["test"][0] < start["test"][0]


@pytest.mark.parametrize(
    ("losses", "more"),
    [
        ({1e-3: 2.0, 3.16e-3: 1.0, 1e-2: 2.0}, ()),
        ({1e-3: 1.0, 3.16e-3: 2.0}, (1e-4, 3.16e-4)),
        ({1e-3: 2.0, 3.16e-3: 1.0}, (1e-2, 3.16e-2)),
        ({1e-3: math.inf, 3.16e-3: math.inf}, ()),
        ({1e-3: 1.0}, ()),
    ],
)
def test_extension(losses, more):
    assert protocol.extension(losses) == more


def test_a_grid_is_centred_at_the_cards_rate(tmp_path):
    wanted = options(tmp_path, grid=(), rates=8)
    for kind in (lf.LoRA, lf.Full, lf.IA3):
        lrs = protocol.first_grid(wanted, kind())
        assert len(lrs) == 8
        assert lrs[2] < kind.card.lr < lrs[6]


def test_groups():
    every = Sweep(data=Path("."), device="cpu")
    found = protocol.groups(every, base())
    assert found[0].variant == lf.LoRA(r=8)
    assert len({group.key for group in found}) == len(found)
    assert {group.variant.name() for group in found if group.set == "configured"} == {
        *protocol.TRAINABLE
    }
    full = [g for g in found if g.variant == lf.Full()]
    assert [g.set for g in full] == ["configured", "all-linear"]


def test_matched_parameters(tmp_path):
    """DeLoRA's, PiSSA's and VeRA's counts are the adapter's, and the nearest to LoRA's."""
    model = base()
    wanted = options(tmp_path, r=4)
    lora = protocol.count(lf.LoRA(r=4), lf.LoRA.card.layers, model)
    for name in ("pissa", "delora", "hra"):
        group = protocol.matched(name, wanted, model)
        adapter, _ = lf.adapt(
            model, group.variant, targets=group.targets, generator=torch.Generator()
        )
        own = sum(shape.numel() for shape in adapter.shapes.values())
        assert own == protocol.count(group.variant, group.layers, model)
        assert abs(math.log(own / lora)) < 0.3


def test_orders_are_paired_and_do_not_repeat():
    lengths = [10 + i % 50 for i in range(200)]
    plan = data.orders(lengths, steps=20, batch=4, seeds=3)
    assert plan.shape == (3, 20, 4)
    for seed in range(3):
        assert len(set(plan[seed].flatten().tolist())) == 80
    more_seeds = data.orders(lengths, steps=20, batch=4, seeds=5)
    assert torch.equal(more_seeds[:3], plan)
    spread = torch.tensor(lengths)[plan].amax((0, 2)) - torch.tensor(lengths)[plan].amin((0, 2))
    assert spread.float().mean() < 12  # of 50


def test_solved_counts_the_right_numbers(tmp_path):
    assert evaluate.number("so 3 + 4 = 7\n#### 7") == 7
    assert evaluate.number("it is 1,234.") == 1234
    assert evaluate.number("no idea") is None
    model, chosen = base(), problems(tmp_path)[:4]
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(names=(r"q_proj$",)))
    counts = evaluate.solved(
        model, adapter, lf.stack([params, params]), chosen, word_tokenizer(), new_tokens=3
    )
    assert len(counts) == 2
    assert (
        counts[0]
        == counts[1]
        == evaluate.solved(model, None, {}, chosen, word_tokenizer(), new_tokens=3)[0]
    )
    loss = evaluate.losses(model, None, {}, chosen)  # and the base attends apart again
    assert loss.isfinite().all()


@pytest.mark.parametrize("name", protocol.TRAINABLE)
def test_every_variant_trains_as_a_population(name, tmp_path):
    """Members that diverge raise nothing, whatever a variant computes of its leaves."""
    # The blocks of the cards divide its layers.
    model = base(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    wanted = options(tmp_path, variants=(name,), grid=(1e-3, 1e38), steps=3, r=4)
    assert run.main(wanted, model, word_tokenizer())
    rows = rows_of(tmp_path / "out")
    (trained,) = [row for row in rows if row["kind"] == "pass"]
    assert all(map(math.isfinite, trained["validation"][:2]))
    (test,) = [row for row in rows if row["kind"] == "test"]
    assert all(map(math.isfinite, test["test"]))


@pytest.mark.parametrize(("name", "alike"), [("lora", False), ("pissa", True), ("loraxs", True)])
def test_what_draws_nothing_starts_all_seeds_alike(name, alike, tmp_path):
    """And as `Adapter.init` starts each."""
    wanted = options(tmp_path, variants=(name,))
    model, tokenizer = base(), word_tokenizer()
    held = run.Job(
        wanted,
        model,
        tokenizer,
        data.load(tokenizer, wanted),
        files.Results(tmp_path / "out" / "results.jsonl"),
        0,
        lambda: True,
    )
    search = run.Search(held, protocol.groups(wanted, model)[0])
    assert (search.starts[0] is search.starts[1]) == alike
    for seed, start in enumerate(search.starts):
        own = search.adapter.init(model, generator=torch.Generator().manual_seed(seed))
        assert largest(own, start) == 0


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """A small sweep, in two parts."""
    folder = tmp_path_factory.mktemp("swept")
    for k in range(2):
        wanted = options(
            folder,
            variants=("lora", "pissa", "full"),
            sets=("configured", "all-linear", "matched"),
            out=folder / f"part{k}",
            part=(k, 2),
            grid=(1e-3, 1e-2, 1e-1),
            steps=4,
            length=24,
            generate=3,
        )
        assert run.main(wanted, base(), word_tokenizer())
    return folder


def test_report(swept, tmp_path, capsys):
    paths = [str(swept / f"part{k}" / "results.jsonl") for k in range(2)]
    assert command(["report", *paths, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert page.count("<img ") == 4  # a CPU counts no peak of memory
    for name in ("curves", "forest", "parameters", "forgotten"):
        assert (tmp_path / f"sweep-{name}.png").stat().st_size > 5000
    labels = [row["label"] for row in summary["rows"]]
    assert len(labels) == 6  # matched, LoRA and PiSSA are as configured
    assert {"lora", "pissa", "full fine-tuning", "lora, all linear"} <= set(labels)
    for label in labels:
        assert label in page
    printed = capsys.readouterr().out
    for line in summary["findings"]:
        assert line in printed
        assert html.escape(line) in page
    (lora,) = [row for row in summary["rows"] if row["label"] == "lora"]
    assert lora["to lora"] == [0, 0, 0]
    assert "Problems solved" in page
    assert report.table(summary, "configured", "github").count("\n") == 4


def test_a_later_run_adds_the_problems_solved(tmp_path):
    """It trains the chosen learning rate once more, and measures nothing twice."""
    wanted = options(tmp_path, steps=3, length=24)
    model, tokenizer = base(), word_tokenizer()
    assert run.main(wanted, model, tokenizer)
    before = rows_of(tmp_path / "out")
    again = dataclasses.replace(wanted, generate=3)
    for _ in range(2):
        assert run.main(again, model, tokenizer)
    rows = rows_of(tmp_path / "out")
    added = [row["kind"] for row in rows if row not in before]
    assert added == ["solved", "solved"]
    summary = results.summary(results.read([tmp_path / "out" / "results.jsonl"]))
    counts = [summary["base"]["none"], *summary["rows"]]
    assert [len(row["solved gsm8k"]["right"]) for row in counts] == [1, wanted.seeds]
    assert all(row["solved arithmetic"]["of"] == 3 for row in counts)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Differences with effects of seeds and of problems, whose mean is 0.1 nats per token."""
    rng = np.random.default_rng(0)
    tokens = np.full(100, 10.0)
    held = 0
    for _ in range(200):
        noise = rng.normal(0, 2, (20, 1)) + rng.normal(0, 2, (1, 100)) + rng.normal(0, 2, (20, 100))
        middle, low, high = results.interval(1.0 + noise, tokens)
        assert low < middle < high
        held += low < 0.1 < high
    assert 0.90 < held / 200 < 0.99


def test_wilson():
    """Against the values of a published table (Newcombe 1998, method 3)."""
    assert results.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert results.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_parts_of_different_sweeps_do_not_mix(swept, tmp_path):
    assert run.main(options(tmp_path), base(), word_tokenizer())
    with pytest.raises(lf.LoraFuncError, match="different settings"):
        results.read([tmp_path / "out" / "results.jsonl", swept / "part0" / "results.jsonl"])


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        command(["--help"])
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for field in dataclasses.fields(Sweep):
        name = field.name.replace("_", "-")
        found = re.search(rf"{name} (.*?)(?= --|$)", text, re.IGNORECASE)
        assert found is not None, field.name
        assert re.search(r"\w+ \w+", found[1])
