"""A hypernetwork: a second network writes the adapter of each example.

Use it where the adapter should follow from a description: of a task, a user, a
document. The adapted forward is a pure function of the adapter's parameters, so
they may come from anywhere, and the gradient flows through them:

    loss(adapted_forward(x, hypernetwork(description of x)))
"""

import torch
from torch import nn
from toy import counting, language_model, loss_per_example

import lora_func as lf

model = language_model()
targets = lf.Targets(names=(r"(k|v|gate)_proj$",))
adapted_forward, start = lf.adapt(model, lf.IA3(), targets=targets)


class Hypernetwork(nn.Module):
    """Maps what is known of an example to leaves `[examples, *shape]`.

    What is known here is the step in which the example counts.
    """

    def __init__(self, tasks, width=32):
        super().__init__()
        self.body = nn.Sequential(
            nn.Embedding(tasks, width), nn.Linear(width, width), nn.Tanh()
        )
        heads = [nn.Linear(width, leaf.numel()) for leaf in start.values()]
        for head in heads:  # zero, so that every adapter starts at `start`
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def forward(self, task):
        hidden = self.body(task)
        return {
            key: leaf + head(hidden).unflatten(1, leaf.shape)
            for head, (key, leaf) in zip(self.heads, start.items())
        }


torch.manual_seed(0)
hypernetwork = Hypernetwork(tasks=8)
optimizer = torch.optim.Adam(hypernetwork.parameters(), lr=1e-2)
for iteration in range(60):
    step = torch.randint(8, (16,))
    ids = counting(16, step=step, seed=iteration)
    each = hypernetwork(step)  # an adapter for each of the 16 examples
    logits = adapted_forward(model, each, {"input_ids": ids}).logits
    loss = loss_per_example(logits, ids).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if iteration % 20 in (0, 19):
        print(f"iteration {iteration:2d}: loss {loss:.2f}")
assert loss < 4.1  # chance is log(64) = 4.16
