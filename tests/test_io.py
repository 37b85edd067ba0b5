"""Files: a round trip keeps every bit, and errors name what is wrong."""

from __future__ import annotations

import json
import os
import random
import re
import warnings
from io import BytesIO
from pathlib import Path

import pytest
import torch
from models import adapted, mlp, qwen3_600m, text_batch, tiny_llama
from safetensors import torch as safetensors
from torch import nn

import lora_func as lf
from lora_func.files import format as io

NAME = "adapter.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A model, its PiSSA adapter with constants, trained parameters, and the file."""
    model, adapter, params = adapted(lf.PiSSA(r=4))
    lf.save(tmp_path / NAME, adapter, params)
    return model, adapter, params, tmp_path / NAME


def rewrite(path: Path, change) -> None:
    """Changes the metadata and tensors of a file with care: the digest matches again."""
    content = path.read_bytes()
    header, tensors = io.header_of(BytesIO(content)), safetensors.load(content)
    meta = json.loads(header["__metadata__"][io.KEY])
    change(meta, tensors)
    meta.pop("digest")
    data = BytesIO(safetensors.save(tensors))
    meta["digest"] = io.digest(meta, io.header_of(data), data)
    path.write_bytes(safetensors.save(tensors, {io.KEY: json.dumps(meta)}))


def test_round_trip_of_a_mixture(tmp_path):
    model = tiny_llama().bfloat16()
    rules = {
        r"(k|v)_proj$": lf.IA3(),
        r"down_proj$": lf.DeLoRA(r=2, start="paper"),
        r".": lf.HRA(r=4, init_norm=0.3),
    }
    model, adapter, params = adapted(rules, model, targets=lf.Targets(), dtype=torch.bfloat16)
    lf.save(tmp_path / NAME, adapter, params)
    again, loaded = lf.load(str(tmp_path / NAME), model)
    assert dict(again.variants) == dict(adapter.variants)
    assert list(loaded) == list(params)
    assert {leaf.dtype for leaf in loaded.values()} == {torch.bfloat16}
    assert all(torch.equal(loaded[key], params[key]) for key in params)
    assert all(torch.equal(again.frozen[key], adapter.frozen[key]) for key in adapter.frozen)
    batch = text_batch()
    assert torch.equal(again(model, loaded, batch).logits, adapter(model, params, batch).logits)
    fresh = again.init(model, generator=torch.Generator())
    logits, base = again(model, fresh, batch).logits, model(**batch).logits
    torch.testing.assert_close(logits, base, rtol=2e-2, atol=2e-2)  # bfloat16, at init


def test_leaves_the_random_state_alone(saved):
    model, _, _, path = saved
    state = torch.get_rng_state()
    lf.load(path, model)
    assert torch.equal(torch.get_rng_state(), state)


def test_params_that_share_memory(tmp_path):
    """They may be views of one tensor, as unbind makes them. The format itself refuses such."""
    targets = lf.Targets(names=("0", "2"), roles=())
    model, adapter, params = adapted(lf.IA3(), mlp(), targets=targets)
    params = dict(zip(params, torch.randn(2, 16).unbind()))
    lf.save(tmp_path / NAME, adapter, params)
    _, loaded = lf.load(tmp_path / NAME, model)
    assert loaded.keys() == params.keys()
    assert all(torch.equal(leaf, params[key]) for key, leaf in loaded.items())


def test_loaded_tensors_are_aligned(saved):
    """The format aligns them to 8 bytes. The CPU's matrix kernels round otherwise than at 64."""
    adapter, params = lf.load(saved[3], saved[0])
    assert all(leaf.data_ptr() % 64 == 0 for leaf in (*params.values(), *adapter.frozen.values()))


def test_no_pickle(saved):
    """A file holds JSON and numbers."""
    header = io.header_of(BytesIO(saved[3].read_bytes()))
    assert json.loads(header["__metadata__"][io.KEY])["variants"] == [
        ["pissa", {"r": 4, "alpha": None, "rslora": False, "svd": "exact", "niter": 4}]
    ]


# bad files


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1], ids=lambda keep: f"keep {keep}")
def test_truncated(saved, keep):
    model, _, _, path = saved
    path.write_bytes(path.read_bytes()[:keep])
    message = "not a whole safetensors file, so it was truncated or altered"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.load(path, model)


def test_every_altered_byte_is_noticed(saved):
    """Whichever byte changes, and to whatever value, `load` raises LoraFuncError."""
    model, _, _, path = saved
    content = path.read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        altered = bytearray(content)
        place = generator.randrange(len(content) if generator.random() < 0.5 else 3000)
        altered[place] ^= generator.randrange(1, 256)
        path.write_bytes(altered)
        with pytest.raises(lf.LoraFuncError):
            lf.load(path, model)


def test_no_file(saved):
    with pytest.raises(lf.LoraFuncError, match=r"there is no file '.*nothing.safetensors'"):
        lf.load(saved[3].with_name("nothing.safetensors"), saved[0])


def test_a_file_of_something_else(saved):
    model, _, params, path = saved
    safetensors.save_file(params, path)
    message = "a safetensors file, but not one that lora_func.save wrote"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.load(path, model)


def drop(dictionary, key):
    del dictionary[key]


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda meta, _: meta.update(format=2),
            "the file has format 2, and this lora_func reads 1; install a newer one",
        ),
        (
            lambda meta, _: meta.update(variants=[["pisa", {}]]),
            "unknown variant 'pisa'. Did you mean 'pissa'",
        ),
        (
            lambda meta, _: meta.update(variants=[["pissa", {"rank": 4}]]),
            "unknown field 'rank' of 'pissa'.* known ones are 'r', 'a",
        ),
        (
            lambda meta, _: meta.update(variants=[["pissa", {"r": 0}]]),
            r"PiSSA\(r=0\): r must be an integer of at least 1",
        ),
        (
            lambda meta, _: meta.update(variants=[["pissa", {"r": "4"}]]),
            r"PiSSA\(r='4'\): r must be an integer",
        ),
        (
            lambda meta, _: meta.update(variants=[["pissa", {"r": 5}]]),
            r"lora_A' is torch.float32 of shape \(4, 32\)",
        ),
        (
            lambda meta, _: meta.update(variants=[["lora", {"r": 10**9}]]),
            "frozen params: unexpected",
        ),
        (lambda meta, _: meta.update(variants=[["lora", {"r": 4}]]), "frozen params: unexpected"),
        (
            lambda meta, _: meta.update(variants={"pissa": {}}),
            "its metadata is not what lora_func.save writes",
        ),
        (lambda meta, _: drop(meta, "targets"), "its metadata is not what lora_func.save writes"),
        (
            lambda meta, _: meta["targets"].update({Q: [7, 48, 32, None]}),
            "its metadata is not what lora_func.save writes",
        ),
        (
            lambda meta, _: meta["targets"].update({Q: [0, 48]}),
            "its metadata is not what lora_func.save writes",
        ),
        (
            lambda meta, _: meta["targets"].update({Q: [0, 64, 32, None]}),
            r"is \(48, 32\) in this .*, but was \(64, 32\)",
        ),
        (
            lambda meta, _: meta["targets"].update({"model.q": [0, 4, 4, None]}),
            "LlamaForCausalLM has no layer 'model.q'",
        ),
        (lambda meta, _: meta["frozen"].pop(), "trainable params: unexpected"),
        (lambda meta, _: meta["frozen"].append("more"), "frozen params: unexpected 'more'"),
        (
            lambda _, tensors: drop(tensors, f"{Q}.lora_A"),
            f"trainable params: missing '{Q}.lora_A'",
        ),
        (
            lambda _, tensors: tensors.update({f"{Q}.lora_Z": torch.ones(1)}),
            "trainable params: unexpected '.*lora_Z'",
        ),
        (
            lambda _, tensors: tensors.update({f"{Q}.lora_A": torch.ones(32, 4)}),
            r"torch.float32 of shape \(32, 4\), where",
        ),
        (
            lambda _, tensors: tensors.update(
                {f"{Q}.lora_A": torch.ones(4, 32, dtype=torch.int32)}
            ),
            r"torch.int32 of shape \(4, 32\), w",
        ),
    ],
)
def test_a_file_that_does_not_fit(saved, change, message):
    model, _, _, path = saved
    rewrite(path, change)
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.load(path, model)


def test_another_base(saved):
    """Other weights under the same names are a warning or an error that names the layers.

    A model on the meta device has no weights to compare, and passes.
    """
    model, _, params, path = saved
    other = tiny_llama()
    differ = "the weights of 4 of 4 adapted layers differ, such as 'model.layers.0"
    message = f"the adapter was made on another base: {differ}"
    with pytest.warns(UserWarning, match=message):
        _, loaded = lf.load(path, other)
    assert all(torch.equal(loaded[key], params[key]) for key in params)
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.load(path, other, check_base="error")
    with pytest.raises(lf.LoraFuncError, match="check_base='ignore'; expected 'warn' or 'error'"):
        lf.load(path, other, check_base="ignore")
    with torch.no_grad():
        other.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lf.load(path, other, check_base="error")
        lf.load(path, tiny_llama().to("meta"))
        lf.load(path, other.bfloat16())  # a checkpoint that was rounded on loading is the same base


def test_the_shape_of_the_published_model(tmp_path):
    """Qwen3-0.6B without weights: a file needs metadata and shapes alone."""
    model = qwen3_600m()
    adapter, params = lf.adapt(model, lf.LoRA(r=1), targets=lf.Targets(names=("q_proj",)))
    on_cpu = {key: torch.zeros(leaf.shape) for key, leaf in params.items()}
    lf.save(tmp_path / NAME, adapter, on_cpu)
    again, loaded = lf.load(tmp_path / NAME, model)
    assert dict(again.variants) == dict(adapter.variants)
    assert {leaf.device.type for leaf in loaded.values()} == {"meta"}


# writing


def test_a_folder_that_does_not_exist(saved):
    _, adapter, params, path = saved
    message = r"cannot be written: there is no folder '.*/none'; make it first"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.save(path.parent / "none" / NAME, adapter, params)
    with pytest.raises(lf.LoraFuncError, match="is a folder; give the path of a file in it"):
        lf.save(path.parent, adapter, params)


def test_the_old_file_survives_a_failed_write(saved, monkeypatch):
    """A disk that is full halfway through: the error is raised, and the old file alone remains."""
    _, adapter, params, path = saved
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        lf.save(path, adapter, {key: leaf + 1 for key, leaf in params.items()})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [NAME]


def test_a_field_that_no_file_can_hold(tmp_path):
    class Odd(lf.LoRA):
        pass

    model = mlp()
    adapter, params = lf.adapt(model, Odd(), targets=lf.Targets(roles=()))
    object.__setattr__(adapter.variants["0"], "alpha", torch.ones(1))
    message = "a file can store numbers, strings, booleans and None, but alpha is"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.save(tmp_path / NAME, adapter, params)
    assert not list(tmp_path.iterdir())


def test_through_a_link(saved, tmp_path):
    """A symbolic link stays one; the file that it points to is replaced."""
    model, adapter, params, path = saved
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    new = {key: leaf + 1 for key, leaf in params.items()}
    lf.save(link, adapter, new)
    assert link.is_symlink()
    for place in (link, path):
        _, loaded = lf.load(place, model)
        assert all(torch.equal(loaded[key], new[key]) for key in new)


def test_a_model_that_is_one_layer(tmp_path):
    model, adapter, params = adapted(model=nn.Linear(4, 3), targets=lf.Targets())
    lf.save(tmp_path / NAME, adapter, params)
    assert set(lf.load(tmp_path / NAME, model)[1]) == {"lora_A", "lora_B"}


@pytest.mark.parametrize("calibrated", [False, True])
def test_rebuilt_constants(tmp_path, calibrated):
    """A file without constants gives the same adapter from the weights, and is far smaller."""
    model, batch = tiny_llama(hidden_size=64), text_batch()
    variant = lf.AntiPaSTO(r=16)
    adapter, params = lf.adapt(model, variant, calibration=[batch] if calibrated else None)
    params = {key: torch.randn_like(leaf) for key, leaf in params.items()}
    sizes = {}
    for name, frozen, kept in (
        ("store", "store", adapter),
        ("half", "store", adapter.to(torch.bfloat16)),
        ("rebuild", "rebuild", adapter),
    ):
        path = tmp_path / name
        lf.save(path, kept, params, frozen=frozen)
        sizes[name] = path.stat().st_size
        again, found = lf.load(path, model)
        assert all(again.frozen[key].dtype == leaf.dtype for key, leaf in kept.frozen.items())
        logits, expected = again(model, found, batch).logits, kept(model, params, batch).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert sizes["half"] < 0.7 * sizes["store"]
    assert sizes["rebuild"] < 0.4 * sizes["store"]
    other, own = lf.adapt(model, lf.LoRA(r=2))
    with pytest.raises(lf.LoraFuncError, match="'LoRA' has no constants that can be rebuilt"):
        lf.save(tmp_path / "lora", other, own, frozen="rebuild")
    with pytest.raises(lf.LoraFuncError, match=r"expected 'store' or 'rebuild'"):
        lf.save(tmp_path / "lora", other, own, frozen="drop")


def test_a_large_file_is_in_memory_once(tmp_path):
    """Saving copies no tensor that is on the CPU. Reading maps the file, and loading copies it."""
    model = nn.Embedding(1024, 4096)
    adapter, params = lf.adapt(model, lf.Full(), targets=lf.Targets(parameters=("weight",)))
    (leaf,) = params.values()
    _, part = io.serialize({}, params)
    assert part.ctypes.data == leaf.data_ptr()
    lf.save(tmp_path / NAME, adapter, params)
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("reads its own memory from Linux")

    def anonymous() -> int:
        (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", status.read_text())
        return int(kilobytes) // 1024

    before = anonymous()
    manifest = io.parse(tmp_path / NAME, lf.VARIANTS)
    assert anonymous() - before < 8  # of 16 MiB
    (mapped,) = manifest.tensors.values()
    assert torch.equal(mapped, leaf)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """The header is one file's, and the tensors are the other's: they are read again."""
    model, adapter, params = adapted(model=mlp(), targets=lf.Targets(roles=()))
    lf.save(tmp_path / NAME, adapter, params)
    zeros = {key: torch.zeros_like(leaf) for key, leaf in params.items()}
    mapped, calls = safetensors.load_file, []

    def replacing(path: Path) -> dict[str, torch.Tensor]:
        calls.append(path)
        if len(calls) == 1:
            lf.save(path, adapter, zeros)
        return mapped(path)

    monkeypatch.setattr(safetensors, "load_file", replacing)
    _, loaded = lf.load(tmp_path / NAME, model)
    assert len(calls) == 2
    assert not any(leaf.any() for leaf in loaded.values())
