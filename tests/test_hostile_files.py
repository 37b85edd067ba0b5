"""Files made to harm: for any bytes, `load` returns what was saved or raises LoraFuncError.

It does so fast and in little memory. Run as a script with two numbers, this file loads the mutated
files between those numbers and prints what happened. A test does so in a process of its own, so
that a crash or a hang fails that test alone.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import data_for
from effort import MUTATED_FILES
from models import trained
from torch import nn

import lora_func as lf
from lora_func.files import format as io

NAME = "adapter.safetensors"
MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Loose(lf.Variant):
    """A user's own variant, which checks no field. Its layers share a tensor."""

    size: float = 1.0

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        return lf.Params({"d": torch.zeros(d_out)}, frozen={"c": torch.ones(d_in)})

    def init_shared(self, weights, generator):
        return lf.Params({"s": torch.ones(len(weights))})


RULES = {
    "lora": lf.LoRA(r=2, rslora=True),
    "pissa": lf.PiSSA(r=3),
    "dora": lf.DoRA(r=2, detach_norm=False),
    "delora": lf.DeLoRA(r=2, start="paper"),
    "hra": lf.HRA(r=2, init_norm=0.5),
    "corda": lf.CorDA(r=2),
    "antipasto": lf.AntiPaSTO(r=2),
    "mixture": {"0": lf.IA3(), "2": lf.IA3FF(), "4": lf.LoRA(r=1)},
    "loose": Loose(),
}


def base() -> nn.Module:
    """The model for every file here."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16, bias=False), nn.GELU(), nn.Linear(16, 4)
    )


def valid_file(rules: Any, folder: Path) -> bytes:
    """The file that `save` writes for an adapter of `base()`."""
    model, targets = base(), lf.Targets(roles=())
    adapter, params = lf.adapt(model, rules, targets=targets, **data_for(rules, model, targets))
    lf.save(folder / NAME, adapter, trained(params))
    return (folder / NAME).read_bytes()


# changes of a file


@dataclass
class Parts:
    """A file taken apart.

    `holes` maps placeholders, strings in `header` and `meta`, to the raw text in their place.
    """

    header: dict[str, Any]
    meta: Any
    data: bytes
    holes: dict[str, str]

    @classmethod
    def of(cls, content: bytes) -> Parts:
        file = BytesIO(content)
        header, data = io.header_of(file), file.read()
        meta = json.loads(header["__metadata__"][io.KEY])
        return cls({**header, "__metadata__": {io.KEY: "@meta@"}}, meta, data, {})

    def text(self, tree: Any) -> str:
        text = json.dumps(tree)
        for hole, raw in self.holes.items():
            text = text.replace(json.dumps(hole), raw)
        return text

    def whole(self) -> bytes:
        meta = json.dumps(self.text(self.meta))
        header = self.text(self.header).replace('"@meta@"', meta).encode()
        return len(header).to_bytes(8, "little") + header + self.data

    def sealed(self) -> bytes:
        """The file with the digest of its content, if a digest can be computed."""
        try:
            meta = json.loads(self.text(self.meta))
            meta.pop("digest")
            file = BytesIO(self.whole())
            self.meta["digest"] = io.digest(meta, io.header_of(file), file)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        return self.whole()

    def hole(self, raw: str) -> str:
        """A string that becomes `raw` in the text."""
        name = f"@{len(self.holes)}@"
        self.holes[name] = raw
        return name


HOSTILE = (
    *(
        "null",
        "true",
        "false",
        "0",
        "1",
        "-1",
        "2",
        "7",
        "1.5",
        "4.0",
        "-0.0",
        "1e999",
        "NaN",
        "-Infinity",
        "1e308",
        "5e-324",
    ),
    *(
        str(2**31),
        str(2**32 + 2),
        str(2**62),
        str(2**63 - 1),
        str(2**64 - 1),
        str(2**64),
        "1" + "0" * 30,
        "9" * 5000,
    ),
    *(
        "1" + "0" * 400,
        "-1" + "0" * 400,
        '""',
        '"0"',
        '"4"',
        "[]",
        "{}",
        "[[]]",
        "[0]",
        "[null]",
        '{"": {}}',
        "[-1, -1]",
    ),
    *(
        "[0, 9223372036854775807]",
        "[0, 18446744073709551615]",
        "[0, 4294967296, 4294967296]",
        "[" + "1, " * 100 + "1]",
    ),
    *(
        "[" * 2000 + "]" * 2000,
        '{"a":' * 2000 + "0" + "}" * 2000,
        "[" * 100 + "]" * 100,
        "[" * 50_000,
    ),
    *(
        f'"{"a" * 50_000}"',
        f'"{"a." * 20_000}"',
        r'"\ud800"',
        r'"\u0000"',
        '"\u202e\U0001f600\u0130"',
        '"\u00e9"',
    ),
    *(
        '"(a+)+$"',
        '".*"',
        '"../../../etc/passwd"',
        '"__class__"',
        '"__metadata__"',
        '"lora_"',
        '"shared"',
        '"0.lora_A"',
    ),
    *(
        '"lora"',
        '"pissa"',
        '"hra"',
        '"delora"',
        '"paper"',
        '"loose"',
        '"dora"',
        '["lora", {"r": 2}]',
        '["ia3", []]',
    ),
    *(
        '"F64"',
        '"F16"',
        '"BF16"',
        '"F4"',
        '"F8_E8M0"',
        '"C64"',
        '"BOOL"',
        '"U64"',
        '"F8_E4M3"',
        '"I32"',
    ),
)


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything in a JSON value."""
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        entries = tree.items()
    elif isinstance(tree, list):
        entries = enumerate(tree)
    return [found for key, value in entries for found in ((tree, key), *nodes(value))]


def change_json(parts: Parts, rng: random.Random) -> None:
    """One change of the header or of our metadata."""
    tree = rng.choice((parts.header, *[parts.meta] * 5))
    if not (found := nodes(tree)):
        return
    container, key = rng.choice(found)
    match rng.choice((0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5)):
        case 0:
            container[key] = parts.hole(rng.choice(HOSTILE))
        case 1:
            del container[key]
        case 2:  # the value of another place
            other, place = rng.choice(found)
            container[key] = json.loads(json.dumps(other[place]))
        case 3 if isinstance(container, dict):  # another name, or a second entry of the same name
            name = rng.choice((json.dumps(key), *(raw for raw in HOSTILE if raw.startswith('"'))))
            value = container[key] if rng.random() < 0.5 else parts.hole(rng.choice(HOSTILE))
            container[parts.hole(name)] = value
            if rng.random() < 0.5:
                del container[key]
        case 3 | 4:
            container[key] = [container[key]]
        case 5:  # a tensor without bytes, of any shape, at either end
            place = rng.choice((0, len(parts.data)))
            sizes = (0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1)
            shape = [0, *(rng.choice(sizes) for _ in range(rng.randrange(1, 5)))]
            dtype = rng.choice(("F32", "BF16", "I64", "F4", "F8_E5M2"))
            name = rng.choice(("ghost", "0.lora_A", ""))
            entry = {"dtype": dtype, "shape": shape, "data_offsets": [place, place]}
            parts.header[name] = entry


def change_bytes(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """One change that knows nothing of the format except the end of the header."""
    header = min(len(content), 8 + int.from_bytes(content[:8], "little"))
    end = len(content) if rng.random() < 0.4 else header
    i, j = sorted((rng.randrange(end + 1), rng.randrange(end + 1)))
    match rng.randrange(8):
        case 0 | 1:
            flipped = bytearray(content)
            for _ in range(rng.choice((1, 1, 2, 8))):
                if flipped:
                    flipped[rng.randrange(max(1, min(end, len(flipped))))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 2:
            return content[:i]
        case 3:
            return content[:i] + content[j:]
        case 4:
            noise = rng.randbytes(rng.randrange(1, 20))
            filling = rng.choice((noise, b" " * 8, b"\0" * 4096, content[i:j]))
            return content[:i] + filling + content[i:]
        case 5:
            return content[:i] + other[min(len(other), rng.choice((i, j))) :]
        case 6:
            near = int.from_bytes(content[:8], "little") + rng.randrange(-9, 10)
            large = (10**8, 10**8 + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 9, 2**64 - 1)
            length = rng.choice((0, 1, 2, near, len(content), *large))
            return min(max(0, length), 2**64 - 1).to_bytes(8, "little") + content[8:]
        case _:
            return content[:i] + rng.randbytes(j - i) + content[j:]


def mutated(number: int, files: list[bytes]) -> tuple[bytes, bool]:
    """File `number`, the same at every call, and whether its digest was made to fit."""
    rng = random.Random(number)
    content = rng.choice(files)
    changes = rng.choice((1, 1, 1, 2, 5))
    if rng.random() < 0.25:
        for _ in range(changes):
            content = change_bytes(content, rng.choice(files), rng)
        return content, False
    parts = Parts.of(content)
    for _ in range(changes):
        change_json(parts, rng)
    return (parts.sealed(), True) if rng.random() < 0.85 else (parts.whole(), False)


# loading them


def contents(adapter: lf.Adapter, params: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    """Everything in a file, comparable to the bit."""
    bits = {
        key: (leaf.dtype, leaf.shape, leaf.reshape(-1).view(torch.uint8).tolist())
        for key, leaf in {**params, **adapter.frozen}.items()
    }
    return dict(adapter.variants), dict(adapter.base), list(params), bits


def peak_memory() -> int:
    """The most address space that this process has had, touched or not."""
    return 1024 * int(re.findall(r"VmPeak:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def attack(first: int, last: int) -> dict[str, Any]:
    """Loads the mutated files `first` to `last`, and reports what happened."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*the adapter was made on another base")
    loading, events = False, set()
    sys.addaudithook(lambda event, arguments: events.add(event) if loading else None)
    counts, failures, slowest, model = Counter(), [], 0.0, base()
    with tempfile.TemporaryDirectory() as folder:
        path, again = Path(folder) / NAME, Path(folder) / "again.safetensors"
        files = [valid_file(rules, Path(folder)) for rules in RULES.values()]
        originals = []
        for content in files:  # this also imports the modules that are imported late
            path.write_bytes(content)
            originals.append(contents(*lf.load(path, model, variants=[Loose])))
        before = peak_memory()
        resource.setrlimit(resource.RLIMIT_AS, (before + 1024 * MEBIBYTE, resource.RLIM_INFINITY))
        for number in range(first, last):
            content, sealed = mutated(number, files)
            path.write_bytes(content)
            start, loading = time.perf_counter(), True
            try:
                adapter, params = lf.load(path, model, variants=[Loose])
            except lf.LoraFuncError as error:
                kind = re.split("[^a-z ]", str(error).partition("': ")[2])[0][:40]
                counts[f"refused: {kind}"] += 1
                loading = False
                continue
            except BaseException as error:
                failures.append(f"{number}: load raises {type(error).__name__}({str(error)[:200]})")
                continue
            finally:
                loading = False
                slowest = max(slowest, time.perf_counter() - start)
            counts["loaded, sealed" if sealed else "loaded"] += 1
            try:
                found = contents(adapter, params)
                assert sealed or found in originals, "other values than were saved"
                lf.save(again, adapter, params)
                same = contents(*lf.load(again, model, variants=[Loose]))
                assert same == found, "saved and loaded again, it differs"
                if not any(isinstance(variant, Loose) for variant in adapter.variants.values()):
                    adapter(model, params, torch.ones(2, 6))
            except Exception as error:
                name, text = type(error).__name__, str(error)[:200]
                failures.append(f"{number}: the loaded adapter fails with {name}({text})")
        grown = (peak_memory() - before) // MEBIBYTE
    return {
        "counts": dict(counts.most_common()),
        "failures": failures,
        "slowest": slowest,
        "grown": grown,
        "events": sorted(events),
    }


def test_mutated_files():
    """Each file loads as saved or raises LoraFuncError.

    There is no other exception, crash or hang. No code runs, and memory stays of the size of the
    file.
    """
    command = [sys.executable, __file__, "0", str(MUTATED_FILES)]
    child = subprocess.run(
        command, capture_output=True, text=True, timeout=120 + MUTATED_FILES / 20, check=False
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert not found["failures"], "\n".join(found["failures"])
    assert sum(found["counts"].values()) == MUTATED_FILES
    assert found["slowest"] < 5  # seconds; 0.03 on an idle machine
    assert found["grown"] < 64  # MiB; the largest of the files has 0.2
    running = {"exec", "compile", "import", "pickle", "marshal", "subprocess", "socket", "ctypes"}
    changing = {"os", "shutil"}
    kinds = {event.split(".")[0] for event in found["events"]}
    assert "open" in kinds
    assert not kinds & (running | changing)  # no code runs, and no file is changed
    loaded = {kind for kind in found["counts"] if kind.startswith("loaded")}
    assert loaded == {"loaded", "loaded, sealed"}  # some mutations pass all checks


# files that once passed, or failed in another way


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """name -> the bytes of a valid file."""
    folder = tmp_path_factory.mktemp("files")
    return {name: valid_file(rules, folder) for name, rules in RULES.items()}


def in_header(name: str, **entry: Any) -> Callable[[Parts], None]:
    return lambda parts: parts.header.update({name: entry})


def in_variant(**fields: Any) -> Callable[[Parts], None]:
    return lambda parts: parts.meta["variants"][0][1].update(fields)


def in_target(place: int, value: Any) -> Callable[[Parts], None]:
    return lambda parts: parts.meta["targets"]["0"].__setitem__(place, value)


def in_frozen(value: Any) -> Callable[[Parts], None]:
    return lambda parts: parts.meta["frozen"].append(value)


NOT_WHOLE = "not a whole safetensors file"
NOT_OURS = "its metadata is not what lora_func.save writes"
FINDINGS = {
    "empty tensor of a huge shape": (
        "lora",
        in_header("0.lora_Z", dtype="F32", shape=[0, 2**64 - 1], data_offsets=[0, 0]),
        NOT_WHOLE,
    ),
    "no metadata": (
        "lora",
        lambda parts: parts.header.update(__metadata__=None),
        "not one that lora_func.save wrote",
    ),
    "deep nesting in what safetensors ignores": (
        "lora",
        lambda parts: parts.header["0.lora_A"].update(more=parts.hole("[" * 50_000 + "]" * 50_000)),
        NOT_WHOLE,
    ),
    "deep nesting in our metadata": (
        "lora",
        lambda parts: parts.meta.update(library=parts.hole("[" * 50_000 + "]" * 50_000)),
        NOT_OURS,
    ),
    "number of 5,000 digits": (
        "lora",
        lambda parts: parts.meta.update(library=parts.hole("9" * 5000)),
        NOT_OURS,
    ),
    "alpha of 400 digits": (
        "lora",
        in_variant(alpha=10**400),
        "alpha must be a finite number above 0",
    ),
    "alpha that is NaN": (
        "lora",
        in_variant(alpha=float("nan")),
        "field 'alpha' of 'lora' is not a number, a string",
    ),
    "rank of 30 digits": (
        "lora",
        in_variant(r=10**30),
        r"no layer can have the parameters of .LoRA\(r=1000000",
    ),
    "rank of 400 digits": (
        "hra",
        in_variant(r=10**400),
        r"no layer can have the parameters of 'HRA\(r=1000000",
    ),
    "field of a user's variant that is a list": (
        "loose",
        in_variant(size=[1.0]),
        "field 'size' of 'loose' is not a number",
    ),
    "fields that are pairs": (
        "loose",
        lambda parts: parts.meta["variants"][0].__setitem__(1, [["size", 1.0]]),
        NOT_OURS,
    ),
    "variant without a name": (
        "lora",
        lambda parts: parts.meta.update(variants=[[None, {}]]),
        "unknown variant None",
    ),
    "no target": ("lora", lambda parts: parts.meta.update(targets={}), NOT_OURS),
    "infinite shape": ("lora", in_target(1, float("inf")), NOT_OURS),
    "shape in words": ("lora", in_target(1, "16"), NOT_OURS),
    "index from the end": ("lora", in_target(0, -1), NOT_OURS),
    "index that is a boolean": ("lora", in_target(0, False), NOT_OURS),
    "fingerprint that is a list": ("lora", in_target(3, []), NOT_OURS),
    "frozen key that is a number": ("lora", in_frozen(5), NOT_OURS),
    "frozen key that is null": ("pissa", in_frozen(None), NOT_OURS),
    "target that is a container": (
        "lora",
        lambda parts: parts.meta["targets"].update({"": [0, 16, 6, None]}),
        "Sequential is not a linear layer",
    ),
    "target with an odd name": (
        "lora",
        lambda parts: parts.meta["targets"].update({"(a+)+$\ud800\x00": [0, 16, 6, None]}),
        "has no layer",
    ),
    "tensor of another name": (
        "lora",
        in_header("\u202e", dtype="F32", shape=[0], data_offsets=[0, 0]),
        "trainable params: unexpected",
    ),
}


@pytest.mark.parametrize(("name", "change", "message"), FINDINGS.values(), ids=FINDINGS)
def test_findings(files, tmp_path, name, change, message):
    """Each is refused by a message that names the cause, although its digest fits."""
    parts = Parts.of(files[name])
    change(parts)
    (tmp_path / NAME).write_bytes(parts.sealed())
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.load(tmp_path / NAME, base(), variants=[Loose])


@pytest.mark.parametrize("value", [2**64, 1e308, 10**400], ids=["2**64", "1e308", "10**400"])
def test_no_field_is_beyond_a_float(value):
    """A number that torch cannot take as a scalar is refused by the constructor."""
    with pytest.raises(lf.LoraFuncError, match=r"alpha must be a finite number above 0 and below"):
        lf.LoRA(alpha=value)


def test_the_last_of_two_entries_of_one_name(files, tmp_path):
    """JSON allows such entries. Both readers of the header must take the same one."""
    parts = Parts.of(files["lora"])
    parts.header = {
        parts.hole('"0.lora_A"'): {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        **parts.header,
    }
    (tmp_path / NAME).write_bytes(parts.sealed())
    adapter, params = lf.load(tmp_path / NAME, base())
    (tmp_path / NAME).write_bytes(files["lora"])
    assert contents(adapter, params) == contents(*lf.load(tmp_path / NAME, base()))


# paths


def test_a_pickle_is_not_opened(tmp_path):
    """A file by torch.save is refused unread, and nothing in it runs."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    torch.save({"0.lora_A": Trap()}, tmp_path / NAME)
    with pytest.raises(lf.LoraFuncError, match=NOT_WHOLE):
        lf.load(tmp_path / NAME, base())
    assert not (tmp_path / "trap").exists()


def test_paths_that_are_no_file(tmp_path):
    """The error names a folder, a broken link, links in a circle, and a pipe, which would block."""
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    for name in ("broken", "circle", "pipe", "a\0b"):
        with pytest.raises(lf.LoraFuncError, match="there is no file"):
            lf.load(tmp_path / name, base())
    with pytest.raises(lf.LoraFuncError, match="is a folder; give the path of a file in it"):
        lf.load(tmp_path, base())


def test_kinds_of_paths(files, tmp_path):
    """A string, a Path and a link give the same. Bytes are a TypeError, as for pathlib."""
    path, link = tmp_path / NAME, tmp_path / "link"
    path.write_bytes(files["lora"])
    link.symlink_to(path)
    expected = contents(*lf.load(path, base()))
    assert contents(*lf.load(str(path), base())) == contents(*lf.load(link, base())) == expected
    with pytest.raises(TypeError):
        lf.load(os.fsencode(path), base())  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    json.dump(attack(int(sys.argv[1]), int(sys.argv[2])), sys.stdout, indent=1)
    sys.exit()
