"""The laws of an adapter on a base that `fully_shard` has sharded.

test_distributed.py runs this file on two ranks.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from models import largest, text_batch, tiny_llama, trained
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import lora_func as lf

# The all-gather of FSDP2 in 2.11 reads the storage of tensors, and torch.func's wrappers have none.
RECENT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
VARIANTS = [
    lf.LoRA(r=4),
    lf.DoRA(r=4),
    lf.PiSSA(r=4),
    lf.DeLoRA(r=4),
    lf.DeLoRA(r=4, start="paper"),
    lf.HRA(r=4),
    lf.IA3(),
    lf.HiRA(r=4),
]


def shard(model: Any) -> Any:
    """Shards each block and the rest, in place."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def base(**changes) -> tuple[Any, Any]:
    """A frozen model, and a sharded copy of it."""
    model = tiny_llama(**changes).requires_grad_(False)
    return model, shard(copy.deepcopy(model))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def gradients(
    adapter: lf.Adapter, model: nn.Module, params: dict[str, Tensor], batch
) -> dict[str, Tensor]:
    leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
    adapter(model, leaves, batch).loss.backward()
    # `.grad` is contiguous; gloo averages the slices that autograd.grad returns wrongly.
    return {key: cast(Tensor, leaf.grad) for key, leaf in leaves.items()}


def averaged(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    for grad in grads.values():
        dist.all_reduce(grad)
        grad.div_(dist.get_world_size())
    return grads


def batches() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch, and the part of it that this rank sees."""
    ids = text_batch(rows=4)["input_ids"]
    own = ids.chunk(dist.get_world_size())[dist.get_rank()]
    return {"input_ids": ids, "labels": ids}, {"input_ids": own, "labels": own}


def test_gradients(variant):
    """Averaged over ranks, gradients equal those of one process on the whole batch.

    The base gets no gradient and keeps its bits.
    """
    model, sharded = base()
    adapter, params = lf.adapt(model, variant)
    params, (whole, own) = trained(params), batches()
    want = gradients(adapter, model, params, whole)
    for _ in range(2):  # the second step starts from the state that the first one leaves
        assert largest(averaged(gradients(adapter, sharded, params, own)), want) < 1e-6
    _, grads = lf.value_and_grad(lambda p: adapter(sharded, p, own).loss)(params)
    assert largest(averaged(grads), want) < 1e-6
    for (name, given), expected in zip(sharded.named_parameters(), model.parameters()):
        assert given.grad is None, name
        assert torch.equal(given.full_tensor(), expected), name


def test_adapt_after_sharding(variant):
    """`adapt` gathers the weights that it reads.

    Parameters, constants and fingerprints are the same as on the unsharded model.
    """
    model, sharded = base(attention_bias=True)
    adapter, params = lf.adapt(model, variant, generator=seeded())
    again, same = lf.adapt(sharded, variant, generator=seeded())
    assert again.base == adapter.base
    for given, expected in (
        (same, params),
        (again.frozen, adapter.frozen),
        (again.init(sharded, generator=seeded()), params),
    ):
        assert given.keys() == expected.keys()
        assert all(torch.equal(given[key], expected[key]) for key in given)
        assert not any(hasattr(leaf, "full_tensor") for leaf in given.values())


def test_merge(variant):
    """Every rank gets whole merged weights; distributed again, they load into the sharded model."""
    model, sharded = base(attention_bias=True)
    adapter, params = lf.adapt(model, variant)
    params, (batch, _) = trained(params), batches()
    merged = lf.merge(adapter, sharded, params)
    assert largest(merged, lf.merge(adapter, model, params)) == 0
    want = adapter(sharded, params, batch).logits
    shards = dict(sharded.named_parameters())
    parts = {
        key: distribute_tensor(W, shards[key].device_mesh, shards[key].placements)
        for key, W in merged.items()
    }
    sharded.load_state_dict(parts, strict=False)
    torch.testing.assert_close(sharded(**batch).logits, want, rtol=0, atol=1e-4)


def test_each_linear_layer_sharded_apart(variant):
    """A layer reshards its weight before the variant reads it, so the library gathers it again."""
    model = tiny_llama().requires_grad_(False)
    adapter, params = lf.adapt(model, variant)
    params, (batch, _) = trained(params), batches()
    want = gradients(adapter, model, params, batch)
    sharded = copy.deepcopy(model)
    for module in list(sharded.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    # A layer with hooks runs apart from its update, and rounds elsewhere than the fused one.
    assert largest(gradients(adapter, shard(sharded), params, batch), want) < 1e-6


def test_transforms_files_and_generate():
    """Laws that need no particular variant."""
    # The CPU's fused attention kernel has no forward mode.
    model, sharded = base(attn_implementation="eager")
    adapter, params = lf.adapt(model, lf.DoRA(r=4))
    params, (batch, _) = trained(params), batches()
    ids = {"input_ids": batch["input_ids"][:, :4], "max_new_tokens": 3, "do_sample": False}

    def everything(model):
        def loss(p):
            return adapter(model, p, batch).loss

        grads, tangent = {}, torch.zeros(())
        if RECENT:
            grads = torch.func.grad(loss)(params)
            tangent = torch.func.jvp(loss, (params,), (params,))[1]
        _, each = lf.value_and_grad(loss)(lf.expand(params, 4))
        found = {**grads, "tangent": tangent, **{f"{key} each": grad for key, grad in each.items()}}
        return found, lf.bind(adapter, model, params).generate(**ids)

    (given, tokens), (expected, same_tokens) = everything(sharded), everything(model)
    assert largest(given, expected) < 1e-6  # examples are mapped where a weight is not at hand
    assert torch.equal(tokens, same_tokens)
    file = Path(sys.argv[1]) / f"rank{dist.get_rank()}.safetensors"
    lf.save(file, adapter, params)
    loaded, same = lf.load(file, sharded, check_base="error")
    assert largest(same, params) == 0
    found = lf.probe(loaded, sharded, params, batch)
    assert found.base_unchanged
    assert not found.inert


def test_a_base_that_requires_grad_is_refused():
    """A copy of its parameters would stay sharded in the forward."""
    sharded = shard(tiny_llama())
    adapter, params = lf.adapt(sharded, lf.LoRA())
    message = r"'model.embed_tokens' .*\n?.*model.requires_grad_\(False\), before"
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter(sharded, params, text_batch())


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    reading = [*VARIANTS[1:3], VARIANTS[-1]]  # DoRA and HiRA on each call, PiSSA at init
    for law, variants in (
        (test_gradients, VARIANTS),
        (test_adapt_after_sharding, VARIANTS),
        (test_merge, reading),
        (test_each_linear_layer_sharded_apart, reading),
    ):
        for variant in variants:
            torch.manual_seed(0)
            print(law.__name__, variant, flush=True)
            law(variant)
    for law in (test_transforms_files_and_generate, test_a_base_that_requires_grad_is_refused):
        torch.manual_seed(0)
        print(law.__name__, flush=True)
        law()
    dist.destroy_process_group()
