"""Writes the tables of README and docs from the catalogue and the committed results.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A test fails if one is out of
date; `python bench/tables.py` writes all of them anew.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, read
from sweep import report
from tabulate import tabulate

import lora_func as lf
from lora_func.card import TARGETS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def markdown(rows: list[list[str]], headers: list[str]) -> str:
    """A table as GitHub reads it."""
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def trainable(card: lf.Card) -> str:
    """ "A `[r, d_in]`, B `[d_out, r]`", in the spelling of the papers."""
    pretty = {
        name: text.partition(" if ")[0].replace(" // ", " / ").replace(" * ", " ")
        for name, text in card.trainable.items()
    }
    return ", ".join(f"{name} `[{shape}]`" for name, shape in pretty.items()) or "nothing"


def variants() -> str:
    """The cards of the catalogue in brief."""
    rows = []
    for kind in lf.VARIANTS.values():
        card = kind.card
        paper = f"[{card.authors}](https://{card.url})"
        rows.append([f"`{kind.__name__}`", card.title, paper, trainable(card)])
    return markdown(rows, ["class", "what it does", "paper", "trainable, per layer"])


def formulas() -> str:
    """The formula of each method, and how many numbers it trains."""
    rows = []
    for kind in lf.VARIANTS.values():
        card = kind.card
        variant = card.suggested(kind, r=8)
        shapes = card.shapes(variant, (4096, 4096), bias=0).values()
        count = sum(math.prod(shape) for shape in shapes)
        formula = card.formula.replace("|", "\\|")  # it would end the cell
        rows.append([f"`{kind.__name__}`", f"`{formula}`", f"{count:,}"])
    return markdown(rows, ["class", "formula", "numbers, 4096 x 4096, r=8"])


AT_INIT = {
    "exact": "the base, to the bit",
    "rounding": "up to rounding",
    "moved": "moved by design",
}
READS = {
    "nothing": ("nothing", "stays packed"),
    "init": ("the matrix once, at init", "unpacked once"),
    "rows": ("the matrix at init, r rows per call", "unpacked once"),
    "dense": ("the matrix, on each call", "unpacked on each call"),
}
DATA = {"none": "no", "optional": "if given", "required": "yes"}


def methods() -> str:
    """How each method starts, and for coming from PEFT."""
    rows = []
    for kind in lf.VARIANTS.values():
        card = kind.card
        config = "-"
        if card.peft is not None:
            fields = ", ".join(
                f"{k}={v!r}" for k, v in card.peft.fields.items() if v not in ([], TARGETS)
            )
            config = f"`{card.peft.config}({fields})`"
        lr = f"{card.lr:g}" if card.trainable else "-"
        cells = [AT_INIT[card.at_init], lr, config]
        rows.append([f"`{kind.__name__}`", *cells, card.beside_peft])
    return markdown(rows, ["class", "at init", "lr", "in PEFT", "beside it"])


def supports() -> str:
    """What the engine can do with each method, as its class tells by what it overrides."""
    rows = []
    for kind in lf.VARIANTS.values():
        merges = kind.merged is not lf.Variant.merged
        factors = kind.factors is not lf.Variant.factors
        sites = merges and kind.card.data != "required"
        parameters = "-"
        if sites:
            parameters = "of any shape" if kind.card.any_shape else "matrices"
        experts = ("low-rank" if factors else "dense") if sites else "-"
        axis = "layers, parameters" if sites and factors else "layers"
        yes = ["yes" if found else "-" for found in (merges, factors)]
        rows.append([f"`{kind.__name__}`", *yes, parameters, experts, axis])
    return markdown(rows, ["class", "merge", "factors", "parameters", "experts", "example axis"])


def needs() -> str:
    """What each method needs to know of the weight and the data."""
    rows = []
    for kind in lf.VARIANTS.values():
        cells = [*READS[kind.card.reads], DATA[kind.card.data]]
        rows.append([f"`{kind.__name__}`", *cells])
    return markdown(rows, ["class", "reads of the weight", "packed weight", "calibration"])


def versions() -> str:
    """What is promised at least, and what the tests run with."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    rows = []
    for name in ("torch", "safetensors", "transformers", "bitsandbytes", "peft"):
        least = re.search(rf'"{name}(?:\[\w+\])?>=([\d.]+)"', project)
        tested = re.search(rf"^{name}==(.+)$", pins, flags=re.M)
        rows.append([name, *(found[1] if found else "any" for found in (least, tested))])
    return markdown(rows, ["package", "at least", "tested with"])


FAMILIES = {
    "lora": "LoRA",
    "low-rank": "LoRAXS",
    "gates": "IA3",
    "singular": "SSVD",
    "sparse": "SHiRA",
}
"""Page of the reference -> the first of its variants: the catalogue is in the order of families."""


def reference(family: str) -> str:
    """The entries of one page of the reference."""
    kinds = list(lf.VARIANTS.values())
    names = [kind.__name__ for kind in kinds]
    starts = [names.index(first) for first in FAMILIES.values()]
    start = names.index(FAMILIES[family])
    end = min((other for other in starts if other > start), default=len(names))
    entries = (f"::: {kind.__module__}.{kind.__name__}" for kind in kinds[start:end])
    return "\n\n".join(f"{entry}\n    options:\n      members: false" for entry in entries)


def overhead(kind: str) -> str:
    """Time and memory of a step, beside PEFT."""
    result, ran_on = read(f"overhead-{kind}")
    s = result["settings"]
    rows = [
        [
            row["variant"],
            str(row["targets"]),
            f"{row['time over base']['ours']:.2f}",
            f"{row['time over base']['peft']:.2f}",
            f"{row['mebibytes']['ours'] - row['mebibytes']['base']:,.0f}",
            f"{row['mebibytes']['peft'] - row['mebibytes']['base']:,.0f}",
        ]
        for row in result["rows"]
    ]
    headers = ["variant", "layers", "time / base", "PEFT: time / base"]
    table = markdown(rows, [*headers, "MiB over base", "PEFT: MiB over base"])
    memory = "peak of the step" if s["device"] == "cuda" else "bytes saved for backward"
    about = (
        f"{s['layers']} layers, batch {s['batch']} x {s['tokens']} tokens, {s['dtype']}, "
        f"r={s['r']}; memory: {memory}."
    )
    return f"{table}\n\n{about} {ran_on}."


def launches(kind: str) -> str:
    """A step in eager mode, compiled, and as a CUDA graph."""
    result, ran_on = read(f"launches-{kind}")
    s = result["settings"]
    ways = ["base, eager", "eager", "compiled", "CUDA graph"]
    rows = []
    for row in result["rows"]:
        ms = row["milliseconds"]
        times = [f"{ms[way]:.0f}" if way in ms else "-" for way in ways]
        rows.append([f"LoRA, {row['targets']} layers", *times])
    headers = ["frozen base, eager", "adapted, eager", "torch.compile", "CUDA graph"]
    table = markdown(rows, ["ms per step", *headers])
    about = f"{s['layers']} layers, batch {s['batch']} x {s['tokens']} tokens, bfloat16"
    return f"{table}\n\n{about}, r={s['r']}. {ran_on}."


def population(kind: str) -> str:
    """A step of K adapters, by several ways."""
    result, ran_on = read(f"population-{kind}")
    s = result["settings"]
    ways = ["population", "stacked", "vmap(grad)", "one by one", "peft"]
    measured = ["population", "vmap(grad)"]  # ways of which the memory is shown
    rows = []
    for row in result["rows"]:
        times, peaks = row["milliseconds"], row["mebibytes"]
        setting = [row["variant"], str(row["K"]), str(row["examples"]), f"{times['base']:.0f}"]
        time = [f"{times[way] / times['base']:.2f}" if way in times else "-" for way in ways]
        memory = [f"{peaks[way] / peaks['base']:.2f}" if way in peaks else "-" for way in measured]
        rows.append([*setting, *time, *memory])
    headers = ["variant", "K", "examples each", "base, ms", *ways[:-1], "PEFT"]
    table = markdown(rows, [*headers, "memory: population", "memory: vmap(grad)"])
    memory = "peak of the step" if s["device"] == "cuda" else "bytes saved for backward"
    about = (
        f"{s['layers']} layers, {s['tokens']} tokens, {s['dtype']}, r={s['r']} on q and v; "
        f"over the base; memory: {memory}."
    )
    return f"{table}\n\n{about} {ran_on}."


def multilora(kind: str) -> str:
    """One linear layer with K LoRAs, beside grouped products of sorted tokens."""
    result, ran_on = read(f"multilora-{kind}")
    s, ways = result["settings"], ["prime-rl", "grouped", "select", "each", "bound"]
    measured = ["grouped", "select", "each"]  # ways of which the memory is shown
    ways = [way for way in ways if way in result["rows"][0]["mebibytes"]]
    rows = []
    for row in result["rows"]:
        cells = [str(row["K"]), str(row["tokens of an example"])]
        for way in ways:
            own = [row[k][way] for k in row if k.endswith("over base") and way in row[k]]
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in own))
        peaks = row["mebibytes"]
        rows.append([*cells, *(f"{peaks[way]:.1f}" for way in measured)])
    cuda = s["device"] == "cuda"
    headers = ["K", "tokens of an example", *ways, *(f"{way}, MiB" for way in measured)]
    about = (
        f"{s['tokens']} tokens, width {s['width']}, r={s['r']}, {s['dtype']}; time over the base"
    )
    about += ", eager / captured" if cuda else ""
    about += f"; memory: {'peak of the step' if cuda else 'bytes saved for backward'}."
    return f"{markdown(rows, headers)}\n\n{about} {ran_on}."


def headline(kind: str) -> str:
    """The largest population, in a sentence."""
    result, _ = read(f"population-{kind}")
    row = max(result["rows"], key=lambda row: row["K"])
    ms, mib = row["milliseconds"], row["mebibytes"]
    time, memory = ms["population"] / ms["base"], mib["population"] / mib["base"]
    return (
        f"{row['K']} LoRAs on one {kind.upper()}: {time:.2f} times the time and "
        f"{memory:.2f} times the memory of the frozen base on the same batch, "
        f"{ms['one by one'] / ms['population']:.0f} times faster than one by one."
    )


def view(kind: str) -> str:
    """What a call costs before any arithmetic."""
    result, ran_on = read(f"view-{kind}")
    rows = [[row["step"], f"{row['milliseconds']:.1f}"] for row in result["rows"]]
    return f"{markdown(rows, ['28 layers, 56 adapted', 'ms'])}\n\n{ran_on}."


def decode(kind: str) -> str:
    """A decoded token through a bound view, over the base's, and captured over captured."""
    result, ran_on = read(f"decode-{kind}")
    s, rows = result["settings"], result["rows"]
    graph = "captured over captured base" in rows[0]
    cells: dict[str, list[str]] = {}
    for row in rows:
        own = [row["time over base"], *([row["captured over captured base"]] if graph else [])]
        cells.setdefault(row["variant"], []).append(" / ".join(f"{x:.2f}" for x in own))
    counts = {(row["targets"], row["layers"], row["batch"], row["adapters"]): 0 for row in rows}
    headers = [f"{on} ({layers}): {n} x {k}" for on, layers, n, k in counts]
    first = "eager / captured" if graph else "time / base"
    table = markdown([[name, *own] for name, own in cells.items()], [first, *headers])
    dtype = "bfloat16" if graph else f"float32, threads: {s['threads']}"
    about = f"Sequences x adapters, {s['layers']} layers, after {s['prompt']} tokens, r={s['r']}"
    return f"{table}\n\n{about}, {dtype}. {ran_on}."


def speed(kind: str) -> str:
    """A training step in the shapes of real models, in each way that it can run."""
    result, ran_on = read(f"speed-{kind}")
    who = ["ours", "bound", "torch.func.grad", "base by torch.func.grad", "peft"]
    rows = []
    for row in result["rows"]:
        times, peaks = row["over base"], row["mebibytes"]
        setting = f"{row['shape']}, {row['layers']} layers, {row['batch']} x {row['tokens']}"
        memory = [
            f"{(peaks[name] - peaks['base']) / 1024:.1f}"
            if name in peaks and row["way"] != "graph"
            else "-"
            for name in ("ours", "peft")
        ]
        failed = {name: "out of memory" for name in row["errors"] if name == "peft"}
        rows.append(
            [
                setting,
                row["way"],
                f"{row['variant']}, {row['targets']}",
                f"{row['milliseconds']['base']:.0f}",
                *(f"{times[n]:.2f}" if n in times else failed.get(n, "-") for n in who),
                *memory,
            ]
        )
    headers = ["model and batch", "way", "variant", "base, ms", "ours", "ours, bound", "ours, grad"]
    table = markdown(rows, [*headers, "base, grad", "PEFT", "GiB over base", "PEFT: GiB"])
    several = sorted({row["in a row"] for row in result["rows"]})
    about = (
        f"Times over the base's; {result['settings']['dtype']}, r=32. A round is "
        f"{several[0]} to {several[-1]} steps without a wait between them."
    )
    return f"{table}\n\n{about} {ran_on}."


def speed_floor(kind: str) -> str:
    """What the steps ask of a GPU, beside what they took."""
    result, _ = read("speed-floor-cpu")
    names = ("shape", "layers", "batch", "tokens", "way", "variant", "targets")
    measured = {tuple(row[n] for n in names): row for row in read(f"speed-{kind}")[0]["rows"]}
    rows = []
    for row in result["rows"]:
        beside = measured[tuple(row[n] for n in names)]
        times, peaks = beside["over base"], beside["mebibytes"]
        took = " / ".join(f"{times[who]:.2f}" for who in ("ours", "bound") if who in times)
        setting = f"{row['shape']}, {row['layers']} layers, {row['batch']} x {row['tokens']}"
        counted = [f"{row[f'{what} over base']:.2f}" for what in ("kernels", "operations")]
        memory = [row["mebibytes over base"], peaks["ours"] - peaks["base"]]
        shown = [f"{x:,.0f}" if row["way"] != "graph" else "-" for x in memory]
        adapter = f"{row['variant']}, {row['targets']}"
        rows.append([setting, row["way"], adapter, *counted, took, *shown])
    headers = ["model and batch", "way", "variant", "kernels", "operations", "step: call / bound"]
    headers += ["MiB, counted", "MiB, measured"]
    s = result["settings"]
    plain, grad = (f"{result['base'][way] / 1024:.1f} GiB" for way in ("plain", "torch.func.grad"))
    about = (
        f"Counted with the rates of {s['rates']}; {s['dtype']}, r=32. All over the base's. "
        f"The base alone, 8 layers of 8B: {plain} at the peak of a plain step, {grad} by "
        "torch.func.grad."
    )
    return f"{markdown(rows, headers)}\n\n{about}"


def kernels(kind: str) -> str:
    """What the steps ask of the GPU."""
    result, ran_on = read(f"kernels-{kind}")
    rows: list[list[str]] = []
    shown = {"ours": "ours", "bound": "ours, bound", "torch.func.grad": "ours, grad"}
    bases = {"base": "base", "base by torch.func.grad": "base, grad"}
    for row in result["rows"]:
        numbers = [f"{row[name]:.1f}" for name in ("milliseconds", "cpu", "wall")]
        adapter = f"{row['variant']} on {row['targets']}"
        who = bases.get(row["who"]) or f"{adapter}, {shown[row['who']]}"
        model = f"{row['shape']}, {row['layers']} layers"
        rows.append([model, row["way"], who, f"{row['kernels']:,}", *numbers])
    rows = [
        row
        for i, row in enumerate(rows)
        if row[2] not in bases.values() or row[:3] not in [r[:3] for r in rows[:i]]
    ]
    headers = ["model", "way", "step", "kernels", "they run for, ms", "CPU, ms", "step, ms"]
    return f"{markdown(rows, headers)}\n\nbfloat16, r=32. {ran_on}."


def functional() -> str:
    """Other libraries on the flat dict, beside what their users write by hand."""
    result, ran_on = read("functional-cpu")
    rows = []
    for row in result["rows"]:
        ms = [f"{row['milliseconds'][way]:,.0f}" for way in ("ours", "by hand")]
        rows.append([row["what"], *ms, f"{row['by hand over ours']:.2f}"])
    s = result["settings"]
    about = (
        f"{s['layers']} layers of width {s['hidden']}, Laplace 2 of 64; {s['examples']} examples"
    )
    table = markdown(rows, ["", "ms", "by hand, ms", "by hand / ours"])
    return f"{table}\n\n{about} of {s['tokens']} tokens, float32. {ran_on}."


def quantized(kind: str) -> str:
    """Every adapter on 4-bit and 8-bit bases."""
    result, ran_on = read(f"quantized-{kind}")
    s = result["settings"]
    columns = ["identity error", "gradient norm", "loss", "loss after", "drop %", "mebibytes"]
    apart = "torch.func.grad - autograd, relative"
    rows = [
        [
            row["variant"],
            row["base"],
            *(f"{row[column]:.3g}" for column in columns),
            f"{row[apart]:.0e}",
        ]
        for row in result["rows"]
    ]
    table = markdown(rows, ["variant", "base", *columns[:-1], "MiB", "functional"])
    memory = "peak of a step" if s["device"] == "cuda" else "bytes saved for backward"
    about = (
        f"{s['layers']} layers, batch {s['batch']} x {s['tokens']}, {s['dtype']}, "
        f"r={s['r']} on q, v and down; MiB: {memory}."
    )
    return f"{table}\n\n{about} {ran_on}."


def profiled(kind: str) -> str:
    """Kernels that a step of a population launches."""
    result, ran_on = read(f"profile-{kind}")
    rows = [
        [row["variant"], f"{row['launches']:,}", f"{row['milliseconds']:.0f}"]
        for row in result["rows"]
    ]
    table = markdown(rows, ["K=16", "kernels launched", "ms for which they run"])
    return f"{table}\n\n{ran_on}."


def svd(kind: str) -> str:
    """The randomized SVD against the exact one."""
    result, ran_on = read(f"svd-{kind}")
    s = result["settings"]
    rows = [
        [
            row["spectrum"],
            row["way"],
            f"{1e3 * row['seconds']:.0f}",
            f"{row['times faster']:.0f}",
            f"{row['energy']:.4f}",
        ]
        for row in result["rows"]
    ]
    table = markdown(rows, ["spectrum", "SVD", "ms", "times faster", "energy / exact"])
    return f"{table}\n\n{s['n']} x {s['n']}, float32, r={s['r']}. {ran_on}."


def qwen(model: str) -> str:
    """Every variant on a real language model."""
    result, ran_on = read(f"qwen-{model}")
    s = result["settings"]
    whole = {shape["variant"]: f"{shape['trainable']:,}" for shape in result["shapes"]}
    columns = ["identity error", "perturbation delta", "loss0", "lossN", "drop %"]
    columns += ["gradient norm", "parameter delta", "reload error"]
    rows = [
        [
            row["variant"],
            f"{row['trainable']:,}",
            *(f"{row[column]:.3g}" for column in columns),
            f"{row['bytes'] / 1024:.0f}",
            whole.get(row["variant"], "-"),
        ]
        for row in result["rows"]
    ]
    headers = ["variant", "trainable", *columns, "file, KiB", "all of Qwen3-0.6B, r=32"]
    about = (
        f"{s['model']}, {s['dtype']}, r={s['r']} (of the AntiPaSTO family in both columns 8 times "
        f"that), {s['steps']} steps of AdamW on {s['tokens']} tokens; the base unchanged."
    )
    return f"{markdown(rows, headers)}\n\n{about} {ran_on}."


def reached() -> str:
    """The share of each model that targets reach."""
    result, _ = read("reach-cpu")
    rows = []
    for row in result["rows"]:
        names = [f"`{name}`" for name in row["names"]]
        parameters = [f"`{name}`" for name in row["named parameters"]]
        named = ["names " + ", ".join(names)] if names else []
        named += ["parameters " + ", ".join(parameters)] if parameters else []
        size = f"{row['parameters'] / 1e9:.3g}"
        rows.append([row["model"], size, f"{row['default']:.1%}", f"{row['named']:.1%}"])
        rows[-1].append("; ".join(named).replace("|", "\\|"))
    headers = ["model", "parameters, 10⁹", "defaults", "named", "with"]
    about = "Sizes of the default configurations; for Qwen3Moe, that of Qwen3-30B-A3B."
    return f"{markdown(rows, headers)}\n\n{about}"


def experts() -> str:
    """A block of fused experts beside PEFT, on each device that was measured."""
    names = sorted(path.stem for path in RESULTS.glob("experts-*.json"))
    return "\n\n".join(map(experts_of, names))


def experts_of(name: str) -> str:
    """The same, of one file of results."""
    result, ran_on = read(name)
    s = result["settings"]
    rows = []
    for row in result["rows"]:
        time = row["time over base"]
        cells = [row["implementation"], f"{row['tokens']:,}", str(row["r"]), row["contender"]]
        cells += [f"{each:.2f}" for each in time.values()]
        if row["contender"] != "base":
            rows.append([*cells, f"{row['mebibytes over base']:,.0f}"])
    headers = ["experts", "tokens", "r", "adapter", *result["rows"][0]["time over base"]]
    about = (
        f"{s['experts']} experts, {s['hidden']} x {s['width']}, top {s['top']}, {s['dtype']}; "
        "times over those of the base; memory: peak of the step."
    )
    return f"{markdown(rows, [*headers, 'MiB over base'])}\n\n{about} {ran_on}."


def swept(kind: str, chosen: str) -> str:
    """One set of the sweep: what each method learned, forgot and cost."""
    result, _ = read(f"sweep-{kind}")
    return report.table(result, chosen, "github")


def sweep_about(kind: str) -> str:
    """How to read these tables, and where they come from."""
    result, _ = read(f"sweep-{kind}")
    return f"{report.LEGEND} {report.about(result)}"


def sweep_solved(kind: str) -> str:
    """What was generated, and how sure the shares are."""
    result, _ = read(f"sweep-{kind}")
    return report.intervals(result, "github")


def seed(kind: str) -> str:
    """The memory of lora-lite's setting."""
    result, ran_on = read(f"seed-{kind}")
    rows = [
        [row["variant"], f"{row['parameters']:,}"]
        + [f"{row[what] / size:.2f}" for what in ("bytes", "counted") for size in (1e9, 2**30)]
        for row in result["rows"]
    ]
    headers = ["", "parameters", "peak, GB", "GiB", "counted, GB", "GiB"]
    s = result["settings"]
    about = (
        f"{s['layers']} layers in the shape of Qwen3-0.6B, {s['batch']} x {s['tokens']} tokens, "
        f"bfloat16, r={s['r']}, AdamW; all that is allocated, the weights of the base included"
    )
    return f"{markdown(rows, headers)}\n\n{about}. {ran_on}."


def sweep_findings(kind: str) -> str:
    """What the sweep says, and what it cannot."""
    result, _ = read(f"sweep-{kind}")
    return "\n".join(f"- {line}" for line in result["findings"])


def parity(kind: str) -> str:
    """Training curves beside PEFT's."""
    result, ran_on = read(f"parity-{kind}")
    s = result["settings"]
    rows = [
        [
            row["variant"],
            f"{row['lr']:g}",
            f"{row['curves']['peft'][0]:.3f}",
            f"{min(row['curves']['peft']):.3f}",
            f"{row['largest difference']:.1e}",
            f"{row['largest difference of a parameter']:.1e}",
        ]
        for row in result["rows"]
    ]
    headers = ["", "learning rate", "first loss", "lowest", "largest difference"]
    table = markdown(rows, [*headers, "of a parameter, at the end"])
    about = f"{s['model']}, float32, {s['steps']} steps of {s['batch']} problems of GSM8K."
    return f"{table}\n\n{about} {ran_on}."


def cost() -> str:
    """Every variant beside PEFT's, on each device that was measured."""
    return "\n\n".join(cost_of(path.stem) for path in sorted(RESULTS.glob("cost-*.json")))


def cost_of(name: str) -> str:
    """The same, of one file of results."""
    result, ran_on = read(name)
    s = result["settings"]
    order = list(lf.VARIANTS)
    rows = sorted(result["rows"], key=lambda row: order.index(row["variant"].partition(",")[0]))
    sides, cells = ("ours", "peft"), []
    for row in rows:
        cells.append([row["variant"]])
        for what in ("step", "forward"):
            over = row[what]["over base"]
            cells[-1] += [f"{over[side]:.2f}" if side in over else "-" for side in sides]
        sizes = row["mebibytes over base"]
        cells[-1] += [f"{sizes[side]:,.0f}" if side in sizes else "-" for side in sides]
    headers = [
        f"{before}{what}" for what in ("step", "forward", "MiB") for before in ("", "PEFT: ")
    ]
    table = markdown(cells, ["variant", *headers])
    about = (
        f"{3 * s['blocks']} layers: {s['hidden']} x {s['hidden']}, {s['hidden']} x {s['width']}, "
        f"{s['width']} x {s['hidden']}; batch {s['batch']} x {s['tokens']} tokens, {s['dtype']}, "
        f"r={s['r']}; times over those of the base; MiB over base: peak of the step."
    )
    failed = [
        f"{who} cannot run {row['variant']} ({error})"
        for row in rows
        for who, error in row["errors"].items()
    ]
    return " ".join([f"{table}\n\n{about} {ran_on}.", *failed])


def cost_headline() -> str:
    """A few of these, on the GPU."""
    result, ran_on = read("cost-h200")
    s, rows = result["settings"], {row["variant"]: row for row in result["rows"]}
    cells = []
    for name in ("lora", "dora", "hra", "loha", "oft", "vera", "shira"):
        step, size = rows[name]["step"]["over base"], rows[name]["mebibytes over base"]
        beside = f"{step['peft']:.2f}x, +{size['peft']:,.0f} MiB"
        cells.append([name, f"{step['ours']:.2f}x, +{size['ours']:,.0f} MiB", beside])
    about = (
        f"A training step over that of the frozen base, and its memory beyond it: layers in the "
        f"shapes of an 8B model, {s['batch']} x {s['tokens']} tokens, {s['dtype']}, r={s['r']}."
    )
    return f"{markdown(cells, ['', 'lora_func', 'PEFT'])}\n\n{about} {ran_on}."


def peaks(of: str) -> str:
    """What the calculator counts beside what was measured."""
    result, _ = read("predicted-cpu")
    _, ran_on = read(of)
    rows = [
        [
            row["variant"],
            f"{row['counted']:,.1f}",
            f"{row['measured']:,.1f}",
            f"{row['counted'] / row['measured'] - 1:+.1%}",
        ]
        for row in result["rows"]
        if row["of"] == of
    ]
    commit = result["where"]["commit"]
    headers = ["MiB", "counted", "measured", "off"]
    return f"{markdown(rows, headers)}\n\nMeasured: {ran_on}. Counted: commit {commit}."


def init(kind: str) -> str:
    """Seconds to initialise, beside PEFT."""
    result, ran_on = read(f"init-{kind}")
    found: dict[str, dict[str, Any]] = {}
    for row in result["rows"]["methods"]:
        found.setdefault(row["method"], {})[row["who"]] = row
    cells = []
    for method, sides in found.items():
        cells.append([method])
        for side in map(sides.get, ("ours", "peft")):
            if side is None:
                cells[-1] += 3 * ["-"]
                continue
            directions = method.startswith(("pissa", "ssvd"))
            share = f"{side['energy']:.4f}" if directions else "-"
            cells[-1] += [f"{side['seconds per layer']:.3f}", str(side["layers"]), share]
    columns = ["s / layer", "layers", "energy / exact"]
    table = markdown(cells, ["method", *columns, *(f"PEFT: {each}" for each in columns)])
    s = result["settings"]
    about = (
        f"Each layer of the 8B shape has 7 linear layers; weights in {s['dtype']}, r={s['r']} "
        f"(SSVD: 8 times that). CorDA sees one batch of {s['tokens']:,} tokens, whose pass counts."
    )
    return f"{table}\n\n{about} {ran_on}."


def decompositions(kind: str) -> str:
    """Ways to the largest singular triplets."""
    result, _ = read(f"init-{kind}")
    cells, r, where = [], result["settings"]["r"], result["where"]
    shown = ("decaying", "steep", "flat", "of rank n / 10", "three outliers")
    for row in result["rows"]["decompositions"]:
        m, n = row["shape"]
        if row.get("r", r) != r or row["spectrum"] not in shown[: 5 if m == n else 1]:
            continue
        if row["way"] == "gesvdj":  # which is what torch takes by itself
            continue
        cells.append(["{} x {}".format(*row["shape"]), row["spectrum"], row["way"]])
        if "error" in row:
            cells[-1] += ["-", "no convergence", "-"]
        else:
            off = max(row["U off"], row["V off"])
            cells[-1] += [f"{1e3 * row['seconds']:,.0f}"]
            cells[-1] += [f"{x:.0e}" for x in (row["singular values off"], off)]
    headers = ["matrix", "spectrum", "way", "ms", "singular values off", "UᵀU - I, VᵀV - I"]
    commits = {row.get("commit", where["commit"]) for row in result["rows"]["decompositions"]}
    ran_on = f"{where['device']}; torch {where['torch']}; commit {', '.join(sorted(commits))}"
    return f"{markdown(cells, headers)}\n\nfloat32, r={r}. {ran_on}."


def scaling(kind: str) -> str:
    """How cost grows, beside what the roofline model predicts."""
    result, ran_on = read(f"scaling-{kind}")
    modelled = {identity(row): row for row in read("roofline-cpu")[0]["rows"]}
    cells, off = [], {"over base": [], "mebibytes over base": []}
    for row in result["rows"]:
        beside, found = modelled[identity(row)], []
        for what, digits in (("over base", ".2f"), ("mebibytes over base", ",.0f")):
            found += [format(row[what], digits) if what in row else "-"]
            found += [format(beside[what], digits)]
            if what in row:
                off[what].append(abs(beside[what] / row[what] - 1))
        cells.append([*identity(row), *found])
    headers = ["model", "variant", "tokens", "r", "targets", "K", "time / base", "predicted"]
    table = markdown(cells, [*headers, "MiB over base", "predicted"])
    time, memory = (f"{statistics.median(each):.1%}" for each in off.values())
    s, rates = result["settings"], result["rates"]
    about = (
        f"28 layers of the 0.6B shape and 4 of the 8B shape, {s['dtype']}. Half of the predictions "
        f"are off by less than {time} in time and {memory} in memory. Measured rates: "
        f"{rates['flops'] / 1e12:.0f} TFLOP/s, {rates['bandwidth'] / 1e12:.2f} TB/s by a copy and "
        f"{rates['narrow'] / 1e12:.2f} TB/s by narrow products, {1e6 * rates['launch']:.1f} us for "
        "an operation."
    )
    return f"{table}\n\n{about} {ran_on}."


def identity(row: dict[str, Any]) -> tuple[str, ...]:
    """What is measured in a row of scaling.py."""
    return tuple(str(row[name]) for name in ("shape", "variant", "tokens", "r", "targets", "K"))


def scaling_70b() -> str:
    """What the roofline model says of a larger model."""
    result, _ = read("roofline-cpu")
    cells = [
        [
            row["variant"],
            row["targets"],
            f"{row['milliseconds']['base']:,.0f}",
            f"{row['over base']:.2f}",
            f"{row['mebibytes']['base'] / 1024:.1f}",
            f"{row['mebibytes over base'] / 1024:.1f}",
        ]
        for row in result["rows"]
        if row["shape"] == "70B"
    ]
    headers = ["70B, predicted", "targets", "base, ms", "time / base", "base, GiB", "GiB over base"]
    last, of = result["rows"][-1], result["settings"]["of"]
    weights, speed = last["gibibytes of the weights"], last["gigabytes a second to hide"]
    about = (
        f"80 layers, {last['tokens']:,} tokens on each GPU, r={last['r']}, bfloat16, with the "
        f"rates of {of}. The weights are {weights:.0f} GiB, which the GPUs share. A step gathers "
        f"them twice; from {speed:.0f} GB/s on, this takes no longer than the base computes."
    )
    return f"{markdown(cells, headers)}\n\n{about}"


def together() -> str:
    """Equal layers that prepare at once, and one by one."""
    result, ran_on = read("together-cpu")
    rows = [
        [
            row["variant"],
            *(f"{row['over base'][who]:.2f}" for who in ("together", "alone")),
            f"{row['together over alone']:.2f}",
        ]
        for row in sorted(result["rows"], key=lambda row: row["together over alone"])
    ]
    s = result["settings"]
    about = f"{s['blocks']} blocks, all linear layers, r={s['r']}, float32, one thread"
    table = markdown(rows, ["variant", "together", "one by one", "ratio"])
    return f"{table}\n\nA training step over the base's: {about}. {ran_on}."


def sharded(kind: str) -> str:
    """A base on one GPU, and its shards on several."""
    result, ran_on = read(f"sharded-{kind}")
    rows = []
    for row in result["rows"]:
        rows.append([row["variant"], f"{row['tokens']:,}"])
        for where in ("whole", "sharded"):
            rows[-1] += [
                f"{row['milliseconds'][f'base, {where}']:.0f}",
                f"{row['over base'][where]:.2f}",
                f"{row['mebibytes over base'][where]:,.0f}",
            ]
    each, last = ["base, ms", "time / base", "MiB over base"], result["rows"][-1]
    headers = ["variant", "tokens of a GPU", *each, *(f"sharded: {name}" for name in each)]
    about = f"{last['layers']} layers of the 8B shape on {last['GPUs']} GPUs, all linear layers"
    return f"{markdown(rows, headers)}\n\n{about}, r={last['r']}, bfloat16. {ran_on}."


TABLES: dict[str, Callable[[], str]] = {
    "init-h200": lambda: init("h200"),
    "decompositions-h200": lambda: decompositions("h200"),
    "scaling-h200": lambda: scaling("h200"),
    "speed-floor": lambda: speed_floor("h200"),
    "scaling-70b": scaling_70b,
    "sweep-findings": lambda: sweep_findings("h200"),
    "sweep-about": lambda: sweep_about("h200"),
    "sweep-configured": lambda: swept("h200", "configured"),
    "sweep-all-linear": lambda: swept("h200", "all-linear"),
    "sweep-rank": lambda: swept("h200", "rank"),
    "sweep-matched": lambda: swept("h200", "matched"),
    "sweep-solved": lambda: sweep_solved("h200"),
    "seed-h200": lambda: seed("h200"),
    "sweep-nf4": lambda: swept("h200", "configured, nf4"),
    "parity": lambda: parity("cpu"),
    "cost-headline": cost_headline,
    "variants": variants,
    "formulas": formulas,
    "methods": methods,
    "supports": supports,
    "needs": needs,
    "versions": versions,
    **{f"reference-{family}": lambda family=family: reference(family) for family in FAMILIES},
    "overhead-cpu": lambda: overhead("cpu"),
    "overhead-h100": lambda: overhead("h100"),
    "launches-h100": lambda: launches("h100"),
    "cost": cost,
    "peaks-model": lambda: peaks("overhead-h100"),
    "peaks-layers": lambda: peaks("cost-h200"),
    "experts": experts,
    "population-headline": lambda: headline("h100"),
    "view-cpu": lambda: view("cpu"),
    "decode-cpu": lambda: decode("cpu"),
    "functional": functional,
    "quantized-cpu": lambda: quantized("cpu"),
    "quantized-h100": lambda: quantized("h100"),
    "profile-h100": lambda: profiled("h100"),
    "svd-h200": lambda: svd("h200"),
    "reach": reached,
    "qwen": lambda: qwen("smollm2-135m-instruct.q4_1-cpu"),
    "population-cpu": lambda: population("cpu"),
    "population-h100": lambda: population("h100"),
    "multilora-cpu": lambda: multilora("cpu"),
    "together-cpu": together,
    "sharded-h200": lambda: sharded("h200"),
    "speed-h200": lambda: speed("h200"),
    "kernels-h200": lambda: kernels("h200"),
    "decode-h200": lambda: decode("h200"),
    "multilora-h200": lambda: multilora("h200"),
}


def filled(text: str) -> str:
    """`text`, with every table written anew from the catalogue and the results."""

    def table(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", table, text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
