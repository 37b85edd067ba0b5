"""Evolution strategies: train without a gradient, 64 adapters in one pass.

Use it where the score has no derivative: a reward, a compiler, a black box
(Salimans et al. 2017, arXiv 1703.03864). Each noise is tried in both ways:

    θ ← θ + η · mean of (F(θ + σ ε) - F(θ - σ ε)) / 2σ · ε
"""

import matplotlib.pyplot as plt
import torch
from toy import counting, language_model, loss_per_example

import lora_func as lf

pairs, sigma, rate = 32, 0.3, 30.0
model, ids = language_model(), counting(4)
targets = lf.Targets(names=(r"(gate|v)_proj$",))
adapted_forward, params = lf.adapt(model, lf.IA3(), targets=targets)
generator = torch.Generator().manual_seed(0)
batch = {"input_ids": ids.repeat(2 * pairs, 1)}


@torch.no_grad()
def fitness(population):
    """Minus the loss of each adapter, `[2 pairs]`. No gradient is taken."""
    logits = adapted_forward(model, population, batch, each=len(ids)).logits
    losses = loss_per_example(logits, batch["input_ids"])
    return -losses.reshape(2 * pairs, -1).mean(1)


means = []
for generation in range(15):
    noise = {
        key: torch.randn(pairs, *leaf.shape, generator=generator)
        for key, leaf in params.items()
    }
    both = {key: torch.cat([each, -each]) for key, each in noise.items()}
    scores = fitness({key: params[key] + sigma * both[key] for key in params})
    means.append(scores.mean().item())
    advantage = (scores[:pairs] - scores[pairs:]) / (2 * sigma)  # [pairs]
    for key, leaf in params.items():
        step = torch.einsum("n,n...->...", advantage, noise[key]) / pairs
        params[key] = leaf + rate * step
    if generation % 5 == 4:
        print(f"generation {generation + 1:2d}: mean loss {-means[-1]:.2f}")
assert means[-1] > means[0] + 0.05

figure, axes = plt.subplots()
axes.plot(range(1, 16), means, "o-")
axes.set(xlabel="generation", ylabel="mean fitness")
figure.savefig("evolution_strategies.png")
