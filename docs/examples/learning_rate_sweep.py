"""Eight LoRAs with eight learning rates in one run of a stock optimizer.

One pass of the base serves all eight.
"""

import torch
from toy import counting, language_model, loss_per_example

import lora_func as lf

model, ids = language_model(), counting(8)
rates = [10**exponent for exponent in (-5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5)]
adapted_forward, params = lf.adapt(model, lf.LoRA(r=4), generator=torch.Generator().manual_seed(0))

# All start alike. Each has a dict of leaves and a parameter group of its own.
adapters = [
    {key: leaf.detach().clone().requires_grad_() for key, leaf in params.items()} for _ in rates
]
optimizer = torch.optim.AdamW(
    [{"params": list(own.values()), "lr": rate} for own, rate in zip(adapters, rates)]
)

# Adapter k sees rows 8k .. 8k+7, so every adapter trains on the same eight sequences.
owner = torch.arange(8).repeat_interleave(len(ids))
for _ in range(30):
    each = lf.select(lf.stack(adapters), owner)
    logits = adapted_forward(model, each, {"input_ids": ids.repeat(8, 1)}).logits
    losses = loss_per_example(logits, ids.repeat(8, 1)).reshape(8, -1).mean(1)
    optimizer.zero_grad()
    losses.sum().backward()  # the sum keeps the gradients of the adapters apart
    optimizer.step()

for rate, loss in zip(rates, losses.tolist()):
    print(f"lr {rate:.0e}: loss {loss:.3f}")
assert losses.argmin() not in (0, 1, 2)  # the smallest rates learn least
