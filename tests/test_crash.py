"""`save` under failure: killed, without space, without permission.

The old file stays, or the new one is whole. Run as a script with a folder, a seed and a number,
this file kills that many processes in the middle of a save and prints what each left. Each is
forked from a process that has loaded torch already.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from effort import KILLS
from torch import nn

import lora_func as lf
from lora_func.files import atomic
from lora_func.files import format as file_format

NAME = "adapter.safetensors"
OPEN = "open"  # the builtin, which a global of a module hides
STEPS = ("open", "write", "fsync", "replace", "replaced", "folder")


def job(size: int = 512) -> tuple[nn.Module, lf.Adapter, dict[str, torch.Tensor]]:
    """A model, an adapter and parameters of value 1: two MiB for size 512."""
    model = nn.Sequential(nn.Linear(size, size))
    adapter, params = lf.adapt(model, lf.LoRA(r=size), targets=lf.Targets(roles=()))
    return model, adapter, {key: torch.ones_like(leaf) for key, leaf in params.items()}


def value_of(path: Path, model: nn.Module) -> float:
    """The one value of all parameters in a file. Raises if the file is not whole."""
    leaves = lf.load(path, model)[1].values()
    values = {value for leaf in leaves for value in leaf.unique().tolist()}
    assert len(values) == 1, f"a mixture of {values}"
    return values.pop()


def scaled(params: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    return {key: leaf * value for key, leaf in params.items()}


# killed


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(step: str) -> None:
    """Lets this process die just before a step of `replace_file`, or halfway through "write"."""
    fsync, replace = os.fsync, os.replace

    class Half:
        def __init__(self, file: Any):
            self.file = file

        def __enter__(self) -> Half:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            die()

    def sync(descriptor: int) -> None:
        if step == ("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync"):
            die()
        fsync(descriptor)

    def rename(*paths: Path) -> None:
        if step == "replace":
            die()
        replace(*paths)
        if step == "replaced":
            die()

    os.fsync, os.replace = sync, rename
    if step == "open":
        setattr(atomic, OPEN, lambda *_: die())
    if step == "write":
        setattr(atomic, OPEN, lambda *arguments: Half(Path.open(*arguments)))


def killed(start: Callable[[int], None], after: float | None) -> None:
    """Forks a process that runs `start(pipe)`, and kills it `after` seconds from its sign of life.

    If `after` is None, the process kills itself.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            start(writer)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b".", "it ended before it began"
    os.close(reader)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"it ended by itself, with status {status}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def kill_many(folder: Path, seed: int, count: int) -> dict[str, Any]:
    """The state of a file after `count` kills at random moments, and after one at each step."""
    torch.set_num_threads(1)
    model, adapter, params = job()
    path, rng = folder / NAME, random.Random(seed)
    values, left, steps = Counter(), Counter(), {}

    def save_forever(pipe: int) -> None:
        choices = [scaled(params, value) for value in (2, 1)]
        os.write(pipe, b".")
        while True:
            for choice in choices:
                lf.save(path, adapter, choice)

    def save_once(step: str) -> Callable[[int], None]:
        def start(pipe: int) -> None:
            new = scaled(params, 2)
            die_at(step)
            os.write(pipe, b".")
            lf.save(path, adapter, new)

        return start

    def temporaries() -> list[str]:
        return sorted(file.name for file in folder.iterdir() if file != path)

    def clean() -> None:
        for name in temporaries():
            (folder / name).unlink()

    lf.save(path, adapter, params)
    start = time.perf_counter()
    for _ in range(3):
        lf.save(path, adapter, params)
    period = 2 * (time.perf_counter() - start) / 3
    for _ in range(count):
        killed(save_forever, rng.uniform(0, 2 * period))
        values[value_of(path, model)] += 1
        left[len(temporaries())] += 1
        assert all(name.startswith(f".{NAME}.") and name.endswith(".tmp") for name in temporaries())
        clean()
    for step in STEPS:
        lf.save(path, adapter, params)
        killed(save_once(step), None)
        steps[step] = [value_of(path, model), len(temporaries())]
        lf.save(path, adapter, params)  # a file that was left behind is no obstacle
        clean()
    return {"values": values, "left": left, "steps": steps}


@pytest.fixture(scope="module")
def after_kills(tmp_path_factory) -> dict[str, Any]:
    """The result of `kill_many`."""
    folder = tmp_path_factory.mktemp("kills")
    command = [sys.executable, __file__, str(folder), "0", str(KILLS)]
    child = subprocess.run(
        command, capture_output=True, text=True, timeout=120 + 2 * KILLS, check=False
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_killed_at_random(after_kills):
    """Each kill leaves a file that is wholly old or wholly new, and at most one hidden file."""
    assert sum(after_kills["values"].values()) == KILLS
    assert after_kills["values"].keys() == {"1.0", "2.0"}
    assert after_kills["left"].keys() <= {"0", "1"}


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_each_step(after_kills, step):
    """Until the rename the file is the old one, from then on the new one.

    The temporary file is there in between.
    """
    value, left = after_kills["steps"][step]
    assert value == (2 if step in ("replaced", "folder") else 1)
    assert left == (1 if step in ("write", "fsync", "replace") else 0)


# failed


@pytest.fixture
def saved(tmp_path):
    """A model, its adapter, parameters of value 1, and their file, alone in its folder."""
    model, adapter, params = job(64)
    lf.save(tmp_path / NAME, adapter, params)
    return model, adapter, params, tmp_path / NAME


@contextlib.contextmanager
def full_disk(monkeypatch) -> Iterator[None]:
    """No file can grow beyond 4 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def raising(
    owner: Any, name: str, after: int = 0
) -> Callable[[pytest.MonkeyPatch], contextlib.AbstractContextManager[None]]:
    """A patch of `owner.name`: it raises KeyboardInterrupt from call number `after` on."""

    @contextlib.contextmanager
    def patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        original, calls = getattr(owner, name), []

        def call(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) > after:
                raise KeyboardInterrupt
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, call)
            yield

    return patched


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        pytest.param(full_disk, OSError, id="full disk"),
        pytest.param(raising(file_format, "raw"), KeyboardInterrupt, id="digest"),
        pytest.param(
            raising(file_format, "raw", 3), KeyboardInterrupt, id="in the midst of writing"
        ),
        pytest.param(raising(atomic.shutil, "copymode"), KeyboardInterrupt, id="mode"),
        pytest.param(raising(os, "fsync"), KeyboardInterrupt, id="sync"),
        pytest.param(raising(os, "replace"), KeyboardInterrupt, id="rename"),
    ],
)
def test_a_failure_leaves_the_old_file(saved, monkeypatch, failure, error):
    """The error is raised at whichever step. The old file is whole, and no temporary file stays."""
    model, adapter, params, path = saved
    with failure(monkeypatch), pytest.raises(error):
        lf.save(path, adapter, scaled(params, 2))
    assert value_of(path, model) == 1
    assert [file.name for file in path.parent.iterdir()] == [NAME]


@contextlib.contextmanager
def anyone() -> Iterator[None]:
    """Acts as a user to whom permissions apply, not as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_without_permission(saved):
    """Closed folders and files raise the system's own errors, and nothing changes."""
    model, adapter, params, _ = saved
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        lf.save(folder / NAME, adapter, params)
        folder.chmod(0o555)
        with anyone(), pytest.raises(PermissionError):
            lf.save(folder / NAME, adapter, scaled(params, 2))
        assert value_of(folder / NAME, model) == 1
        assert [file.name for file in folder.iterdir()] == [NAME]
        (folder / NAME).chmod(0)
        with anyone(), pytest.raises(PermissionError):
            lf.load(folder / NAME, model)
        folder.chmod(0o755)


# written


def test_synced_before_it_is_renamed(saved, monkeypatch):
    """The content is synced first, then renamed, then its folder is synced.

    So after a power cut there is the old file or the new one.
    """
    _, adapter, params, path = saved
    events, fsync, replace = [], os.fsync, os.replace

    def sync(descriptor):
        status = os.fstat(descriptor)
        folder = stat.S_ISDIR(status.st_mode)
        events.append("sync folder" if folder else f"sync {status.st_size} bytes")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    lf.save(path, adapter, params)
    assert events == [f"sync {path.stat().st_size} bytes", "rename", "sync folder"]


def test_a_folder_that_cannot_be_synced(saved, monkeypatch):
    """Some file systems cannot sync a folder. The file is saved all the same."""
    model, adapter, params, path = saved
    fsync = os.fsync

    def sync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    lf.save(path, adapter, scaled(params, 2))
    assert value_of(path, model) == 2


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_any_new_file(saved, mask):
    """The umask decides it, as for `open`."""
    _, adapter, params, path = saved
    before = os.umask(mask)
    try:
        lf.save(path.with_name("new"), adapter, params)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.with_name("new").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_a_replaced_file_keeps_its_mode(saved, mode):
    """A private file stays private, even if it is replaced through a link."""
    model, adapter, params, path = saved
    path.chmod(mode)
    link = path.with_name("link")
    link.symlink_to(path)
    for place in (path, link):
        lf.save(place, adapter, scaled(params, 2))
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert link.is_symlink()
    assert value_of(path, model) == 2


def test_a_name_of_255_bytes(saved):
    """The name of its temporary file must not be longer."""
    model, adapter, params, path = saved
    for name in ("n" * 255, "ü" * 127):
        lf.save(path.with_name(name), adapter, params)
        assert value_of(path.with_name(name), model) == 1


def test_a_device_is_not_replaced(saved):
    """Nor is a pipe. Otherwise root could lose /dev/null."""
    _, adapter, params, path = saved
    os.mkfifo(path.with_name("pipe"))
    with pytest.raises(lf.LoraFuncError, match="is a device or a pipe"):
        lf.save(path.with_name("pipe"), adapter, params)
    assert stat.S_ISFIFO(path.with_name("pipe").stat().st_mode)


if __name__ == "__main__":
    json.dump(kill_many(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), sys.stdout)
