"""MAML (Finn et al. 2017, arXiv 1703.03400) over adapters.

It learns a start from which one step learns a task.
The inner steps of all tasks are one pass: expanded parameters, one gradient of the summed loss.
The outer gradient goes through the inner one. So attention is eager: fused kernels have no second
derivative.
"""

import torch
from toy import counting, language_model, loss_per_example

import lora_func as lf

model = language_model(attn_implementation="eager")
adapted_forward, params = lf.adapt(model, lf.LoRA(r=4), generator=torch.Generator().manual_seed(0))
inner_rate, outer_rate, tasks = 10.0, 1e-2, 8


def loss(each, ids):
    return loss_per_example(adapted_forward(model, each, {"input_ids": ids}).logits, ids)


def after_one_step(params, support, query):
    """Losses on the queries `[tasks]` after one step of each task on its support."""
    each = lf.expand(params, tasks)
    grads = torch.func.grad(lambda p: loss(p, support).sum())(each)
    return loss({key: each[key] - inner_rate * grads[key] for key in each}, query)


leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
optimizer = torch.optim.Adam(leaves.values(), lr=outer_rate)
gains = []
for iteration in range(40):
    query = counting(tasks, step=0, seed=iteration)  # a task is to repeat one token
    meta_loss = after_one_step(leaves, query[:, :4], query).mean()
    optimizer.zero_grad()
    meta_loss.backward()
    optimizer.step()
    with torch.no_grad():
        before = loss(lf.expand(leaves, tasks), query).mean()
    gains.append((before - meta_loss).item())
    if iteration % 10 == 9:
        print(f"iteration {iteration + 1}: one step lowers the loss by {sum(gains[-10:]) / 10:.2f}")
assert sum(gains[-10:]) > sum(gains[:10])
