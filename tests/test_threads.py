"""Threads: many adapters run on one base at once, and each gives the bits that it gives alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES
from effort import SECONDS_OF_THREADS
from models import state_of, text_batch, tiny_llama, trained
from torch.func import grad

import lora_func as lf

# One for each thread.
NAMES = ("lora", "pissa", "dora", "dora-full", "delora", "ia3", "ia3ff", "hra")
TARGETS = [
    lf.Targets(names=(r"q_proj$", r"v_proj$")),
    lf.Targets(names=(r"down_proj$",)),
    lf.Targets(),
]


def together(works: list[Callable[[], Any]], seconds: float = 0.0) -> list[list[Any]]:
    """Calls each callable in a thread of its own, once, and again until time is up.

    Returns the results of each, or raises the first exception.
    """
    results: list[list[Any]] = [[] for _ in works]
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(index: int) -> None:
        try:
            start.wait()
            end = time.monotonic() + seconds
            while True:
                results[index].append(works[index]())
                if time.monotonic() >= end or errors:
                    return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def same(given: Any, expected: Any) -> bool:
    """Whether two tensors, or two dicts of them, have the same bits."""
    if not isinstance(expected, dict):
        return torch.equal(given, expected)
    equal = (same(given[key], expected[key]) for key in expected)
    return given.keys() == expected.keys() and all(equal)


def of_call(model, adapter, params, batch):
    with torch.no_grad():
        return adapter(model, params, batch).logits


def of_bound(model, adapter, params, batch):
    return lf.bind(adapter, model, params)(**batch).logits.detach()


def of_autograd(model, adapter, params, batch):
    leaves = {key: leaf.detach().clone().requires_grad_() for key, leaf in params.items()}
    adapter(model, leaves, batch).loss.backward()
    return {key: leaf.grad for key, leaf in leaves.items()}


def of_transform(model, adapter, params, batch):
    return grad(lambda p: adapter(model, p, batch).loss)(params)


def of_examples(model, adapter, params, batch):
    return lf.value_and_grad(lambda p: adapter(model, p, batch).loss)(lf.expand(params, 3))[1]


# Without jvp: torch has one level of dual numbers for all threads.
KINDS = [of_call, of_bound, of_autograd, of_transform, of_examples]


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "unfrozen"])
def test_eight_adapters_on_one_base(frozen):
    """Calls and gradients in eight threads have the bits of calls in one."""
    model = tiny_llama(attn_implementation="eager").requires_grad_(not frozen)
    before = state_of(model)
    works = []
    for index, name in enumerate(NAMES):
        variant = CASES[name].variant(4)
        adapter, params = lf.adapt(model, variant, targets=TARGETS[index % len(TARGETS)])
        works.append((model, adapter, trained(params), text_batch()))
    expected = [[kind(*work) for kind in KINDS] for work in works]

    def worker(index: int) -> Callable[[], bool]:
        turn = iter(range(index, 10**9))  # each thread starts with another kind

        def work() -> bool:
            which = next(turn) % len(KINDS)
            return same(KINDS[which](*works[index]), expected[index][which])

        return work

    results = together([worker(index) for index in range(len(NAMES))], SECONDS_OF_THREADS / 2)
    print(f"{sum(len(result) for result in results)} calls")
    assert all(len(result) > 0 and all(result) for result in results)
    assert state_of(model) == before


def test_adapt_init_save_and_load_at_once(tmp_path):
    """Each thread makes on a shared model what it makes alone."""
    model, batch = tiny_llama(), text_batch()
    before = state_of(model)

    def worker(index: int) -> Callable[[], dict[str, torch.Tensor]]:
        name = NAMES[index]
        variant = CASES[name].variant(4)

        def work() -> dict[str, torch.Tensor]:
            generator = torch.Generator().manual_seed(index)
            adapter, _ = lf.adapt(model, variant, generator=generator)
            params = adapter.init(model, generator=generator)
            lf.save(tmp_path / f"{name}.safetensors", adapter, params)
            loaded, again = lf.load(tmp_path / f"{name}.safetensors", model, check_base="error")
            assert same(again, params)
            assert same(dict(loaded.frozen), dict(adapter.frozen))
            return {**again, **loaded.frozen, "out": of_call(model, loaded, again, batch)}

        return work

    works = [worker(index) for index in range(len(NAMES))]
    expected = [work() for work in works]
    for results, alone in zip(together(works, SECONDS_OF_THREADS / 3), expected):
        assert all(same(result, alone) for result in results)
    assert state_of(model) == before


def test_an_error_in_one_thread_stays_there():
    """A call that fails midway does not affect the other threads."""
    model, batch = tiny_llama(), text_batch()
    adapter, params = lf.adapt(model, lf.LoRA(r=4))
    params = trained(params)
    expected = of_transform(model, adapter, params, batch)
    bad = {**batch, "input_ids": batch["input_ids"] + 10**6}  # fails in the embedding, below grad

    def failing() -> bool:
        with pytest.raises(IndexError):
            of_transform(model, adapter, params, bad)
        return True

    works = [failing, lambda: same(of_transform(model, adapter, params, batch), expected)] * 2
    assert all(all(result) for result in together(works, SECONDS_OF_THREADS / 6))
