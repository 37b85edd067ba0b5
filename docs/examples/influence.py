"""Which training example helps which test example: dot products of their gradients.

As in TracIn (Pruthi et al. 2020, arXiv 2002.08484).
"""

import torch
from toy import counting, language_model, loss_per_example

import lora_func as lf

model = language_model()
train, test = counting(6, step=[1, 2, 3, 5, 7, 11], seed=1), counting(3, step=[2, 5, 11], seed=1)
adapted_forward, params = lf.adapt(model, lf.LoRA(r=4), generator=torch.Generator().manual_seed(0))
params = {key: leaf + 0.05 * torch.randn_like(leaf) for key, leaf in params.items()}


def losses(each, ids):
    return loss_per_example(adapted_forward(model, each, {"input_ids": ids}).logits, ids)


def gradients(ids):
    """`[examples, parameters]`"""
    _, grads = lf.value_and_grad(lambda each: losses(each, ids).sum())(lf.expand(params, len(ids)))
    return torch.cat([grad.flatten(1) for grad in grads.values()], dim=1)


# [train, test]: by how much a step on example i lowers the loss of example j, per unit of rate
influence = gradients(train) @ gradients(test).T
print("influence of each training example (row) on each test example:", influence, sep="\n")

# The check: take a step on each training example, all six in one pass, and measure.
rate = 1e-4
_, grads = lf.value_and_grad(lambda each: losses(each, train).sum())(lf.expand(params, len(train)))
stepped = {key: params[key] - rate * grads[key] for key in params}
owner = torch.arange(len(train)).repeat_interleave(len(test))
after = losses(lf.select(stepped, owner), test.repeat(len(train), 1)).reshape(len(train), len(test))
lowered = (losses(params, test) - after) / rate
print("measured:", lowered, sep="\n")
assert torch.allclose(influence, lowered, atol=0.1 * influence.abs().max().item())
