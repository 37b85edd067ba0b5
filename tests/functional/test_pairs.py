"""Each library on the flat dict gives what its users compute by hand, to rounding."""

from __future__ import annotations

import by_hand
import functional
import opacus
import pytest
import torch
import torchopt
from models import largest, state_of

import lora_func as lf

# torchopt computes Adam's bias correction in float32: a number to the power of an integer tensor.
ROUNDING = {"four adapters with Adam (torchopt)": 1e-5}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of Opacus' hooks
@pytest.mark.parametrize("name", functional.PAIRS)
def test_the_library_equals_the_hand_written_form(name):
    own = by_hand.toy()  # in float64
    before = state_of(own.model)
    ours, hand = functional.PAIRS[name](own)
    given, expected = ours(), hand()
    assert given.keys() == expected.keys()
    size = max(leaf.abs().max().item() for leaf in expected.values())
    assert largest(given, expected) <= ROUNDING.get(name, 1e-10) * size
    assert largest(ours(), given) == 0  # nothing has changed the adapter or the model
    assert state_of(own.model) == before


def test_stack_module_state_of_bound_modules():
    """It stacks the leaves as `lf.stack` does, and the base too: K times. The leaves suffice."""
    own = by_hand.toy()
    members = [own.another(seed) for seed in range(3)]
    modules = [lf.bind(own.adapter, own.model, member) for member in members]
    whole, buffers = torch.func.stack_module_state(modules)
    stacked = {key: leaf.detach() for key, leaf in lf.stack(members).items()}
    assert largest({key: whole[key].detach() for key in stacked}, stacked) == 0

    def logits(*state):
        return torch.func.functional_call(modules[0], state, kwargs={"input_ids": own.ids}).logits

    with torch.no_grad():
        expected = torch.stack([own.logits(member) for member in members])
        assert (torch.vmap(logits)(whole, buffers) - expected).abs().max() < 1e-12
        assert (torch.vmap(logits)(stacked) - expected).abs().max() < 1e-12


def test_training_is_a_function_of_its_start():
    """torchopt's optimizers are differentiable: the gradient of a loss after Adam's steps."""
    own = by_hand.toy()
    optimizer = torchopt.adam(1e-2, eps_root=1e-8)  # a square root of zero has no derivative

    def after(params):
        state = optimizer.init(params)
        for _ in range(2):
            grads = torch.func.grad(lambda params: own.losses(params).mean())(params)
            updates, state = optimizer.update(grads, state, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return own.losses(params).mean()

    grads, along = torch.func.grad(after)(own.params), own.another(seed=3)
    slope = torch.stack([(grads[key] * along[key]).sum() for key in grads]).sum()
    step = 1e-4
    ahead, behind = (
        after({key: leaf + sign * step * along[key] for key, leaf in own.params.items()})
        for sign in (1, -1)
    )
    assert torch.isclose(slope, (ahead - behind) / (2 * step), rtol=1e-4)


def test_opacus_does_not_wrap_a_bound_module():
    """It knows torch's layers alone. docs/functional.md says so."""
    own = by_hand.toy()
    module = opacus.GradSampleModule(lf.bind(own.adapter, own.model, own.params))
    loss = torch.nn.functional.cross_entropy(module(input_ids=own.ids).logits, own.labels)
    with pytest.raises(ValueError, match="No activations detected"):
        loss.backward()


def test_by_hand_is_the_adapter():
    own = by_hand.toy()
    model, _ = by_hand.wrapped(own, own.params)
    apart = model(input_ids=own.ids).logits - own.logits(own.params)
    assert apart.abs().max() < 1e-12
    assert not torch.equal(own.logits(own.params), own.model(input_ids=own.ids).logits)
