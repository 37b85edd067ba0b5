"""`active`: an adapter that acts on some tokens alone. Base, PEFT's aLoRA and caches agree."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from cases import catalogue
from models import adapted, checkpoint_activations, text_batch, tiny_llama, trained
from torch import Tensor

import lora_func as lf

IDS = text_batch()["input_ids"]
CUT = 6  # the adapter acts from here on
LATE = (torch.arange(IDS.shape[1]) >= CUT).expand(IDS.shape)
EVERYWHERE = torch.ones_like(LATE)


@pytest.mark.parametrize("variant", catalogue().values(), ids=catalogue().keys())
def test_all_and_none(variant):
    """On all tokens it is the adapter, on none the base to the bit."""
    model, adapter, params = adapted(variant)
    wanted = adapter(model, params, IDS).logits
    # Without `active`, a layer may run fused with its update, which rounds elsewhere.
    everywhere = adapter(model, params, IDS, active=EVERYWHERE).logits
    torch.testing.assert_close(everywhere, wanted, rtol=0, atol=1e-6)
    assert torch.equal(adapter(model, params, IDS, active=~EVERYWHERE).logits, model(IDS).logits)


@pytest.mark.parametrize("name", ["lora", "hra", "dora", "ia3", "ia3ff", "chain", "oft"])
def test_tokens_before_are_those_of_the_base(name: str):
    """Those before see nothing of the adapter. Those after continue from the base's own cache."""
    model, adapter, params = adapted(catalogue()[name])
    out = adapter(model, params, IDS, active=LATE).logits
    assert torch.equal(out[:, :CUT], model(IDS).logits[:, :CUT])
    assert not torch.allclose(out[:, CUT:], model(IDS).logits[:, CUT:], atol=1e-4)
    cache = model(IDS[:, :CUT], use_cache=True).past_key_values
    batch = {"input_ids": IDS[:, CUT:], "past_key_values": cache}
    torch.testing.assert_close(adapter(model, params, batch).logits, out[:, CUT:])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks
def test_it_is_pefts_alora():
    """Outputs and gradients, where each row calls it at another place."""
    torch.manual_seed(0)
    model, ids = tiny_llama(), IDS.clone()
    ids[0, 3:5], ids[1, 6:8] = torch.tensor([7, 9]), torch.tensor([7, 9])  # the last row never
    targets = "all-linear"
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        alora_invocation_tokens=[7, 9],
        task_type="CAUSAL_LM",
    )
    theirs: Any = peft.get_peft_model(model, config)
    base = tiny_llama()
    base.load_state_dict(plain(theirs))
    adapter, params = lf.adapt(base, lf.LoRA(r=4, alpha=8))
    leaves = {k: leaf.requires_grad_() for k, leaf in trained(params).items()}
    matrices = dict(theirs.named_parameters())
    name = "base_model.model.{}.lora_{}.default.weight"
    pairs = [
        (leaf, matrices[name.format(*key.rsplit(".lora_", 1))]) for key, leaf in leaves.items()
    ]
    with torch.no_grad():
        for leaf, matrix in pairs:
            matrix.copy_(leaf)
    active = torch.tensor([[3], [6], [99]]) <= torch.arange(ids.shape[1])
    given, wanted = adapter(base, leaves, ids, active=active).logits, theirs(ids).logits
    torch.testing.assert_close(given, wanted)
    for logits in (given, wanted):
        logits.square().sum().backward()
    for leaf, matrix in pairs:
        torch.testing.assert_close(leaf.grad, matrix.grad, rtol=1e-4, atol=1e-5)


def plain(theirs: Any) -> dict[str, Tensor]:
    """The base's own tensors, under its own names."""
    found = theirs.get_base_model().state_dict()
    return {k.replace("base_layer.", ""): t for k, t in found.items() if "lora_" not in k}


def test_populations_compile_and_checkpoints():
    model, adapter, _ = adapted(lf.LoRA(r=4))
    members = [trained(adapter.init(model)) for _ in range(3)]
    population = lf.stack(members)
    out = adapter(model, population, IDS, active=LATE).logits
    for i, params in enumerate(members):
        alone = adapter(model, params, IDS[i : i + 1], active=LATE[i : i + 1]).logits
        torch.testing.assert_close(out[i : i + 1], alone)

    def loss(params: dict[str, Tensor], active: Tensor) -> Tensor:
        return adapter(model, params, IDS, active=active).logits.square().mean()

    grads = torch.func.grad(loss)(members[0], LATE)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(members[0], LATE), loss(members[0], LATE))
    checkpoint_activations(model.train(), use_reentrant=False)
    _, again = lf.value_and_grad(lambda p: loss(p, LATE))(members[0])
    torch.testing.assert_close(again, grads)


@pytest.mark.parametrize(
    ("active", "reason"),
    [
        (torch.ones(3, 10), r"bool tensor \[batch, tokens\], not torch.float32 of shape \(3, 10\)"),
        ([[True]], r"bool tensor .*, not \[\[True\]\]"),
        (EVERYWHERE[:, :4], r"active has shape \(3, 4\), and 'model.*q_proj' sees .*\(3, 10, 32\)"),
    ],
)
def test_what_it_refuses(active: Any, reason: str):
    model, adapter, params = adapted()
    with pytest.raises(lf.LoraFuncError, match=reason):
        adapter(model, params, IDS, active=active)


def test_parameters_see_no_tokens():
    model = tiny_llama()
    targets = lf.Targets(parameters=("embed_tokens.weight$",))
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=targets)
    with pytest.raises(lf.LoraFuncError, match=r"acts on the parameters .* which see no tokens"):
        adapter(model, params, IDS, active=EVERYWHERE)


def test_a_mask_that_the_model_would_ignore():
    """Llama takes any argument. In the batch or given to a bound module, the mask would be lost."""
    model, adapter, params = adapted()
    batch = {"input_ids": IDS, "active": LATE}
    with pytest.raises(lf.LoraFuncError, match="stands beside the batch"):
        adapter(model, params, batch)
    with pytest.raises(lf.LoraFuncError, match="a bound module acts on all tokens"):
        lf.bind(adapter, model, params)(**batch)
