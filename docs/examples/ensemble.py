"""A Bayesian ensemble: 16 adapters as a sample of the posterior, in one pass.

Use it where a prediction needs an honest probability and the data are few.
Each adapter has a start of its own and learns from a bootstrap sample of the
data. The ensemble predicts the mean of their probabilities, and their variance
says where it does not know:

    p(y | x) = mean of p(y | x, θₖ)        variance of p(y | x, θₖ) over k

It is judged by accuracy, negative log likelihood (NLL), and expected
calibration error (ECE): how far confidence is from the share of right answers.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import lora_func as lf

K, n = 16, 24
generator = torch.Generator().manual_seed(0)


def moons(n, turn, noise):
    """Points `[n, 2]` on two half circles, turned, and the circle of each."""
    angle = torch.pi * torch.rand(n, generator=generator)
    label = torch.arange(n) % 2
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    points = torch.where(
        label[:, None] == 1, torch.tensor([1, 0.5]) - points, points
    )
    points = points - torch.tensor([0.5, 0.25])
    points = points + noise * torch.randn(n, 2, generator=generator)
    turn = torch.tensor(turn)
    rows = [[turn.cos(), turn.sin()], [-turn.sin(), turn.cos()]]
    return points @ torch.tensor(rows), label


# %% A base model that has learned a related task from plenty of data
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
)
x, y = moons(512, turn=0.0, noise=0.15)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(100):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.requires_grad_(False)

# %% The ensemble: K adapters that train in one pass, each on its own resample
x, y = moons(n, turn=1.0, noise=0.25)
adapted_forward, _ = lf.adapt(model, lf.LoRA(r=4, alpha=4))
starts = [adapted_forward.init(model, generator=generator) for _ in range(K)]
ensemble = lf.stack(starts)  # leaves [K, *shape]
leaves = {key: leaf.requires_grad_() for key, leaf in ensemble.items()}
resampled = torch.randint(n, (K, n), generator=generator)
optimizer = torch.optim.Adam(leaves.values(), lr=1e-2)
for _ in range(200):
    logits = adapted_forward(model, leaves, x[resampled].flatten(0, 1), each=n)
    losses = F.cross_entropy(logits, y[resampled].flatten(), reduction="none")
    optimizer.zero_grad()
    losses.sum().div(n).backward()
    optimizer.step()


# %% How good are its probabilities?
@torch.no_grad()
def predict(x):
    """Probability of the second moon for each adapter, `[K, points]`."""
    logits = adapted_forward(model, leaves, x.repeat(K, 1), each=len(x))
    return logits.softmax(-1)[:, 1].reshape(K, -1)


def judge(p, y):
    """Accuracy, negative log likelihood, calibration error of 10 bins."""
    right = (p > 0.5) == (y == 1)
    sure = torch.maximum(p, 1 - p)
    bins = (10 * sure).long().clamp(max=9)
    gaps = [(sure - right.float())[bins == i].sum().abs() for i in range(10)]
    nll = F.binary_cross_entropy(p, y.float())
    return right.float().mean().item(), nll.item(), float(sum(gaps)) / len(p)


x_test, y_test = moons(1000, turn=1.0, noise=0.25)
each = predict(x_test)
alone = torch.tensor([judge(p, y_test) for p in each]).mean(0).tolist()
together = judge(each.mean(0), y_test)
print("                  accuracy    NLL    ECE")
for name, row in (("one adapter", alone), (f"{K} together", together)):
    print(f"{name:18s}{row[0]:8.2f}{row[1]:7.2f}{row[2]:7.2f}")
assert together[1] < alone[1]
assert together[2] < alone[2]

# %% Where does it not know?
grid = torch.linspace(-2.5, 2.5, 60)
points = torch.cartesian_prod(grid, grid)
deviation = predict(points).std(0).reshape(60, 60).T
figure, axes = plt.subplots(figsize=(4.2, 3.4))
shown = axes.contourf(grid, grid, deviation, levels=12, cmap="viridis")
figure.colorbar(shown, label="deviation of p over the ensemble")
axes.scatter(*x.T, c=y, cmap="bwr", edgecolors="white", s=28)
axes.grid(visible=False)
figure.savefig("ensemble.png")
