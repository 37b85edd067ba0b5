"""What torch and accelerate do with modules: parameters are found, averaged, moved and cast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from ddp import train_one_rank
from models import largest, state_of, text_batch
from safetensors.torch import load_file
from torch.func import functional_call
from torch.multiprocessing.spawn import spawn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toys import CLIP, DECAY, HALF, RATE, adapted, base, batches, by_hand, copies, schedule, weights

import lora_func as lf

# With constants of their own, with constants that layers share, and without any.
VARIANTS = [lf.LoRA(r=4), lf.DoRA(r=4), lf.PiSSA(r=4), lf.VeRA(r=4), lf.AntiPaSTO(r=4)]
over_variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name())


def bound(variant: lf.Variant) -> tuple[Any, lf.Adapter, dict[str, torch.Tensor], Any]:
    model, adapter, params = adapted(variant)
    return model, adapter, params, lf.bind(adapter, model, params)


def test_two_ranks_have_the_gradients_of_the_whole_batch(tmp_path):
    """In DistributedDataParallel, at each step."""
    variants = [lf.LoRA(r=4), lf.VeRA(r=4), lf.PiSSA(r=4)]
    spawn(train_one_rank, (str(tmp_path), variants), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for variant, *results in zip(variants, *ranks):
        model, adapter, params = adapted(variant)
        leaves = {key: leaf.requires_grad_() for key, leaf in copies(params).items()}
        optimizer, grads = torch.optim.SGD(leaves.values(), lr=1.0), []
        for batch in batches():
            optimizer.zero_grad()
            adapter(model, leaves, batch).loss.backward()
            grads.append({key: leaf.grad.clone() for key, leaf in leaves.items()})  # pyright: ignore
            optimizer.step()
        for theirs, trained in results:
            assert max(largest(a, b) for a, b in zip(theirs, grads)) < 1e-5
            assert largest(trained, copies(leaves)) < 1e-5
        assert largest(copies(leaves), params) > 1e-3


@over_variants
def test_accelerate(variant, tmp_path):
    """Its prepare, its clipping, and its checkpoints, which a new process goes on from."""

    def prepared():
        model, adapter, params, module = bound(variant)
        optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=DECAY)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        accelerator = Accelerator(cpu=True)
        return model, adapter, params, accelerator, accelerator.prepare(module, optimizer, rates)

    def train(accelerator, parts, batches):
        module, optimizer, rates = parts
        for batch in batches:
            optimizer.zero_grad()
            accelerator.backward(module(**batch).loss)
            accelerator.clip_grad_norm_(module.parameters(), CLIP)
            optimizer.step()
            rates.step()

    _, _, _, accelerator, parts = prepared()
    train(accelerator, parts, batches()[:HALF])
    accelerator.save_state(str(tmp_path))
    model, adapter, params, accelerator, parts = prepared()
    start, before = copies(params), state_of(model)
    accelerator.load_state(str(tmp_path))
    train(accelerator, parts, batches()[HALF:])
    expected = by_hand(start, batches(), lambda p, batch: adapter(model, p, batch).loss)
    assert largest(copies(params), expected) < 1e-5
    assert largest(copies(params), start) > 1e-3
    assert state_of(model) == before
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == {**params, **adapter.frozen}.keys()


@over_variants
def test_clipping_and_zeroing_see_the_leaves(variant):
    _model, _adapter, params, module = bound(variant)
    module(**text_batch()).loss.backward()
    norms = torch.stack([leaf.grad.norm() for leaf in params.values()])  # pyright: ignore
    assert torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3) == pytest.approx(norms.norm())
    clipped = torch.stack([leaf.grad.norm() for leaf in params.values()]).norm()  # pyright: ignore
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    module.zero_grad()
    assert all(leaf.grad is None for leaf in params.values())


@over_variants
def test_what_counts_as_trainable(variant):
    model, _adapter, params, module = bound(variant)
    total = sum(leaf.numel() for leaf in params.values())
    assert module.num_parameters(only_trainable=True) == total
    assert module.num_parameters() == model.num_parameters() + total
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert named.keys() == params.keys()
    assert all(named[key] is leaf for key, leaf in params.items())


@over_variants
def test_an_average_of_the_leaves(variant):
    """AveragedModel copies the module. The copy is on the same base, which stays as it is."""
    model, adapter, params, module = bound(variant)
    before, batch = weights(model), text_batch()
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(params.values(), lr=1.0)
    expected = None
    for _ in range(3):
        optimizer.zero_grad()
        module(**batch).loss.backward()
        optimizer.step()
        average.update_parameters(module)
        now = copies(params)
        expected = now if expected is None else {k: expected[k].lerp(now[k], 0.5) for k in now}
    assert largest(average.module.state_dict(), {**expected, **adapter.frozen}) < 1e-6  # pyright: ignore
    out = average(**batch).logits
    torch.testing.assert_close(out, adapter(model, expected, batch).logits)  # pyright: ignore
    assert largest(weights(model), before) == 0
    shared = {p.data_ptr() for p in model.parameters()}
    assert shared <= {p.data_ptr() for p in average.parameters()}


MOVES = {
    "double": lambda module: module.double(),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to dtype": lambda module: module.to(torch.float64),
    "to device": lambda module: module.to("cpu"),
    "share_memory": lambda module: module.share_memory(),
}


@over_variants
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_moving_and_casting_keep_the_leaves(variant, move):
    """They stay the tensors of the dict and of the optimizer, and train; the model stays too."""
    model, adapter, params, module = bound(variant)
    leaves, before, batch = dict(params), state_of(model), text_batch()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    module(**batch)
    assert move(module) is module
    named = dict(module.named_parameters())
    assert all(params[key] is leaf and named[key] is leaf for key, leaf in leaves.items())
    dtypes = {p.dtype for p in module.parameters()}
    assert len(dtypes) == 1
    cast = base().to(dtypes.pop())
    expected = adapter(cast, params, batch)
    out = module(**batch)
    torch.testing.assert_close(out.logits, expected.logits)
    grads = torch.autograd.grad(expected.loss, list(params.values()))
    out.loss.backward()
    start = copies(params)
    for leaf, grad in zip(params.values(), grads):
        torch.testing.assert_close(leaf.grad, grad)
    optimizer.step()
    assert largest(copies(params), start) > 0
    assert not torch.equal(module(**batch).logits, out.logits)
    assert state_of(model) == before


@over_variants
def test_functional_call_still_threads_parameters(variant):
    model, adapter, params, module = bound(variant)
    others = {key: leaf.detach() + 0.1 for key, leaf in params.items()}
    batch = text_batch()
    given = functional_call(module, others, (), batch).logits
    assert torch.equal(given, adapter(model, others, batch).logits)
    assert torch.equal(module(**batch).logits, adapter(model, params, batch).logits)


def test_a_second_adapter_trains_beside_the_first():
    """Two modules on one base, each with an optimizer of its own."""
    model, _adapter, params, module = bound(lf.LoRA(r=4))
    _, second, others = adapted(lf.DoRA(r=2), model=model)
    other, batch = lf.bind(second, model, others), text_batch()
    first, start = copies(params), copies(others)
    optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    (module(**batch).loss + other(**batch).loss).backward()
    optimizer.step()
    assert largest(copies(params), first) == 0
    assert largest(copies(others), start) > 0
    assert all(leaf.grad is not None for leaf in params.values())


def test_copies_train_apart():
    _model, _adapter, params, module = bound(lf.LoRA(r=4))
    twin, batch = copy.deepcopy(module), text_batch()
    start = copies(params)
    trained = [p for p in twin.parameters() if p.requires_grad]
    twin(**batch).loss.backward()
    torch.optim.SGD(trained, lr=1.0).step()
    assert largest(copies(params), start) == 0
    assert largest(twin.state_dict(), start) > 0
