"""A sweep of learning rates: eight LoRAs in one run of a stock optimizer.

Use it before a long training: one pass of the base serves all eight. Each
adapter has a group of the optimizer with a rate of its own. The sum of their
losses keeps their gradients apart, since each loss depends on one adapter.
"""

import matplotlib.pyplot as plt
import torch
from toy import counting, language_model, loss_per_example

import lora_func as lf

# %% Eight adapters that start alike
# In float64, since the largest rate diverges: it enlarges every rounding.
model, ids = language_model().double(), counting(8)
rates = [10**exponent for exponent in (-5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5)]
adapted_forward, params = lf.adapt(
    model, lf.LoRA(r=4), generator=torch.Generator().manual_seed(0)
)
adapters = [
    {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
    for _ in rates
]
groups = [
    {"params": list(own.values()), "lr": rate}
    for own, rate in zip(adapters, rates)
]
optimizer = torch.optim.AdamW(groups)

# %% Adapter k sees rows 8 k .. 8 k + 7, which are the same for all
rows = ids.repeat(8, 1)
batch = {"input_ids": rows}
curves = []
for _ in range(30):
    stacked = lf.stack(adapters)
    logits = adapted_forward(model, stacked, batch, each=len(ids)).logits
    losses = loss_per_example(logits, rows).reshape(8, -1).mean(1)
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    curves.append(losses.tolist())

for rate, loss in zip(rates, curves[-1]):
    print(f"lr {rate:.0e}: loss {loss:.2f}")
assert losses.argmin() not in (0, 1, 2)  # the smallest rates learn least

# %% All curves of the one run
figure, axes = plt.subplots()
for k, (rate, curve) in enumerate(zip(rates, zip(*curves))):
    axes.plot(curve, color=plt.get_cmap("viridis")(k / 8), label=f"{rate:.0e}")
axes.set(xlabel="step", ylabel="loss")
axes.legend(title="learning rate", ncols=2)
figure.savefig("learning_rate_sweep.png")
