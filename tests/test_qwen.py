"""bench/qwen.py on a tiny model: its laws hold, and a broken one is named.

A hub that cannot be reached is told from one that answers with an error.
"""

from __future__ import annotations

import copy
import time
from types import SimpleNamespace

import pytest
import qwen
import torch
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from models import text_batch, tiny_llama

import lora_func as lf


def test_every_variant_of_the_catalogue():
    # SSteer has nothing to train, and LoftQ no quantized model.
    assert {*qwen.TRAINABLE, "ssteer", "loftq"} == {*lf.VARIANTS}


@pytest.fixture
def run(tmp_path):
    model, batch = tiny_llama(head_dim=32), text_batch()  # widths that groups of 64 divide
    return lambda name: qwen.probe(name, model, batch, qwen.Options(r=2, adapters=tmp_path))


@pytest.mark.parametrize("name", qwen.TRAINABLE)
def test_the_laws_hold(run, name):
    row, broken = run(name)
    assert broken == []
    assert row["bytes"] > 4 * row["trainable"]


@pytest.mark.parametrize(
    ("delta", "law"),
    [
        (lambda A, B: 0.01 + B.sum(), "identity at init"),
        (lambda A, B: A.sum() * float("nan"), "the probe runs, instead of: the loss is nan"),
        (lambda A, B: 0 * A.sum(), "a perturbation moves the output"),
        (lambda A, B: 0 * A.sum() + B.detach().sum(), "the gradient norm is finite"),
        (lambda A, B: 0 * A.sum() + B.detach().sum(), "the loss falls"),
    ],
)
def test_a_broken_adapter_is_named(run, monkeypatch, delta, law):
    """LoRA with a delta that is not 0 at init, NaN, always 0, or without a gradient."""

    def apply(self, x, base_out, weight, params):
        return base_out + delta(params["A"], params["B"])

    monkeypatch.setattr(lf.LoRA, "apply", apply)
    monkeypatch.setattr(lf.LoRA, "fused", lf.Variant.fused)
    assert any(name.startswith(law) for name in run("lora")[1])


def test_a_reload_that_differs_is_named(run, monkeypatch):
    load = lf.load

    def altered(*args, **kwargs):
        adapter, params = load(*args, **kwargs)
        return adapter, {key: leaf * 1.001 for key, leaf in params.items()}

    monkeypatch.setattr(lf, "load", altered)
    assert [law.split(",")[0] for law in run("lora")[1]] == ["a reload is equal to the bit"]


@pytest.mark.parametrize(
    "touch", [lambda p: p.data.add_(1.0), lambda p: setattr(p, "grad", torch.zeros_like(p))]
)
def test_a_base_that_was_touched_is_named(run, monkeypatch, touch):
    """A change of its bits and a gradient on it break a law."""

    def copied(model):
        new = copy.deepcopy(model)
        touch(new.model.norm.weight)
        return new

    monkeypatch.setattr(qwen, "copy", SimpleNamespace(deepcopy=copied))
    assert [law for law in run("lora")[1] if law.startswith("the base keeps")]


@pytest.mark.parametrize(
    "error",
    [qwen.TransportError("no route"), OfflineModeIsEnabled("offline"), TimeoutError("slow")],
)
def test_only_a_missing_network_is_an_unreachable_hub(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(qwen.HfApi, "model_info", fail)
    assert qwen.unreachable("some/model") == f"{type(error).__name__}: {error}"


def test_an_answer_that_is_an_error_is_raised(monkeypatch):
    """No such model and no access are no missing network."""

    def fail(*_, **__):
        raise HfHubHTTPError.__new__(HfHubHTTPError)

    monkeypatch.setattr(qwen.HfApi, "model_info", fail)
    with pytest.raises(HfHubHTTPError):
        qwen.unreachable("some/model")


def test_a_hub_that_answers_and_one_that_never_does(monkeypatch):
    monkeypatch.setattr(qwen.HfApi, "model_info", lambda *_, **__: None)
    assert qwen.unreachable("some/model") is None
    monkeypatch.setattr(qwen.HfApi, "model_info", lambda *_, **__: time.sleep(5))
    start = time.perf_counter()
    assert qwen.unreachable("some/model", seconds=0.1) == "TimeoutError: no answer within 0.1 s"
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("broken", [[], ["lora: a law"]])
def test_the_exit_status_says_whether_a_law_is_broken(broken):
    assert qwen.report(broken) == (1 if broken else 0)
