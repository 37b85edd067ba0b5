"""Influence: which training example helps which test example.

Use it to find the data that teach or spoil an answer (TracIn, Pruthi et al.
2020, arXiv 2002.08484). A small step on example i lowers the loss of example j
by the dot product of their gradients, per unit of the learning rate:

    influence(i, j) = ∇ℓᵢ · ∇ℓⱼ

Two backwards give the gradients of all examples. The script then takes the
steps, and measures whether it is true.
"""

import matplotlib.pyplot as plt
import torch
from toy import counting, language_model, loss_per_example

import lora_func as lf

model = language_model()
train = counting(6, step=[1, 2, 3, 5, 7, 11], seed=1)
test = counting(3, step=[2, 5, 11], seed=1)
generator = torch.Generator().manual_seed(0)
adapted_forward, params = lf.adapt(model, lf.LoRA(r=4), generator=generator)
params = {
    key: leaf + 0.05 * torch.randn(leaf.shape, generator=generator)
    for key, leaf in params.items()
}


def losses(each, ids):
    logits = adapted_forward(model, each, {"input_ids": ids}).logits
    return loss_per_example(logits, ids)


# %% Dot products of gradients, [train, test]
def gradients(ids):
    """Leaves `[examples, *shape]`."""
    each = lf.expand(params, len(ids))
    return lf.value_and_grad(lambda each: losses(each, ids).sum())(each)[1]


def flat(grads):
    """`[examples, parameters]`"""
    return torch.cat([grad.flatten(1) for grad in grads.values()], dim=1)


influence = flat(gradients(train)) @ flat(gradients(test)).T
print("influence of each training example (row) on each test example:")
for row in influence.tolist():
    print(" ".join(f"{value:6.2f}" for value in row))

# %% The check: a step on each training example, all six in one pass
rate = 1e-4
stepped = {key: params[key] - rate * g for key, g in gradients(train).items()}
owner = torch.arange(len(train)).repeat_interleave(len(test))
after = losses(lf.select(stepped, owner), test.repeat(len(train), 1))
lowered = (losses(params, test) - after.reshape(len(train), len(test))) / rate
error = (influence - lowered).abs().max() / influence.abs().max()
print("measured within 10 %:", bool(error < 0.1))
assert error < 0.1

# %% Yellow lowers the loss of the test example, dark raises it
figure, axes = plt.subplots(figsize=(3.6, 3.2))
shown = axes.imshow(influence.numpy(), cmap="viridis")
axes.set(xlabel="test: counts by", ylabel="training: counts by")
axes.set_xticks(range(3), ["2", "5", "11"])
axes.set_yticks(range(6), ["1", "2", "3", "5", "7", "11"])
axes.grid(visible=False)
figure.colorbar(shown, label="influence")
figure.savefig("influence.png")
