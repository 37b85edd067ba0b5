"""MAML: learn a start from which one step learns a task.

Use it where each task brings few examples (Finn et al. 2017, arXiv 1703.03400).

    min over θ of Σ ℓ(θ - α ∇ℓ(θ; support), query)

The inner steps of all tasks are one pass: expanded parameters, and the gradient
of the summed loss. The outer gradient goes through the inner one. So attention
is eager: fused kernels have no second derivative.
"""

import matplotlib.pyplot as plt
import torch
from toy import counting, language_model, loss_per_example

import lora_func as lf

inner_rate, outer_rate, tasks = 0.3, 1e-2, 8
model = language_model(attn_implementation="eager")
# One token has nothing to attend to: queries and keys are left out.
adapted_forward, params = lf.adapt(
    model,
    lf.LoRA(r=4),
    targets=lf.Targets(names=(r"(v|o|gate|up|down)_proj$",)),
    generator=torch.Generator().manual_seed(0),
)


def losses(each, ids):
    logits = adapted_forward(model, each, {"input_ids": ids}).logits
    return loss_per_example(logits, ids)


def after_one_step(params, support, query):
    """Losses on the queries, `[tasks]`, after a step of each on its support."""
    each = lf.expand(params, tasks)
    grads = torch.func.grad(lambda p: losses(p, support).sum())(each)
    stepped = {key: each[key] - inner_rate * grads[key] for key in each}
    return losses(stepped, query)


leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
optimizer = torch.optim.Adam(leaves.values(), lr=outer_rate)
before, after = [], []
for iteration in range(40):
    # A task is to repeat one token.
    query = counting(tasks, step=0, seed=iteration)
    meta_loss = after_one_step(leaves, query[:, :4], query).mean()
    with torch.no_grad():
        before.append(losses(leaves, query).mean().item())
    after.append(meta_loss.item())
    optimizer.zero_grad()
    meta_loss.backward()
    optimizer.step()

gains = [b - a for b, a in zip(before, after)]
for i in range(0, 40, 10):
    gain = sum(gains[i : i + 10]) / 10
    print(f"iterations {i + 1:2d} to {i + 10}: one step gains {gain:.1f}")
assert sum(gains[-10:]) > sum(gains[:10])

figure, axes = plt.subplots()
axes.plot(before, label="before the step")
axes.plot(after, label="after one step on four tokens")
axes.set(xlabel="outer iteration", ylabel="loss on new tasks")
axes.legend()
figure.savefig("maml.png")
