"""Serving a mixed batch: one `generate`, another adapter for each prompt.

Use it where many users share one base model. Their requests wait in one queue,
and one pass of the base answers them all. The adapters of these four users are
also trained in one run: each learns to count by a step of its own.
"""

import torch
from toy import counting, language_model, loss_per_example

import lora_func as lf

model = language_model()
adapted_forward, _ = lf.adapt(model, lf.LoRA(r=8))
generator = torch.Generator().manual_seed(0)
steps = torch.tensor([1, 2, 3, 5])  # by which each user counts

# Train all users together: adapter u sees rows 16 u .. 16 u + 15.
users = lf.stack(
    [adapted_forward.init(model, generator=generator) for _ in steps]
)
leaves = {key: leaf.requires_grad_() for key, leaf in users.items()}
owner = torch.arange(len(steps)).repeat_interleave(16)  # the user of each row
optimizer = torch.optim.Adam(leaves.values(), lr=1e-2)
for iteration in range(60):
    ids = counting(len(owner), step=steps[owner], length=8, seed=iteration)
    batch = {"input_ids": ids}
    logits = adapted_forward(model, leaves, batch, each=16).logits
    optimizer.zero_grad()
    loss_per_example(logits, ids).sum().backward()
    optimizer.step()

# Serve them together: six prompts of one token, each with its user's adapter.
user = torch.tensor([3, 0, 0, 2, 1, 3])
prompts = torch.tensor([[7], [7], [40], [7], [7], [20]])
served = lf.bind(adapted_forward, model, lf.select(leaves, user))
options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
options |= {"attention_mask": torch.ones_like(prompts), "pad_token_id": 0}
tokens = served.generate(prompts, **options)
for asked, row in zip(user, tokens):
    print(f"user {asked} counts by {steps[asked]}: {row.tolist()}")
expected = prompts + steps[user, None] * torch.arange(7)
assert torch.equal(tokens, expected % 64)
