"""Evolution strategies (Salimans et al. 2017, arXiv 1703.03864) over adapters.

Antithetic pairs, evaluated in one pass, without a gradient.
"""

import torch
from toy import counting, language_model, loss_per_example

import lora_func as lf

pairs, sigma, rate = 32, 0.3, 30.0
model, ids = language_model(), counting(4)
adapted_forward, params = lf.adapt(model, lf.IA3(), targets=lf.Targets(names=(r"(gate|v)_proj$",)))
generator = torch.Generator().manual_seed(0)
owner = torch.arange(2 * pairs).repeat_interleave(len(ids))


@torch.no_grad()
def fitness(population):
    """Minus the mean loss of each adapter, `[2 pairs]`. It need not be differentiable."""
    rows = ids.repeat(2 * pairs, 1)
    logits = adapted_forward(model, lf.select(population, owner), {"input_ids": rows}).logits
    return -loss_per_example(logits, rows).reshape(2 * pairs, -1).mean(1)


means = []
for generation in range(15):
    noise = {
        key: torch.randn(pairs, *leaf.shape, generator=generator) for key, leaf in params.items()
    }
    scores = fitness(
        {key: params[key] + sigma * torch.cat([noise[key], -noise[key]]) for key in params}
    )
    means.append(scores.mean().item())
    advantage = (scores[:pairs] - scores[pairs:]) / (2 * sigma)  # [pairs]
    for key, leaf in params.items():
        step = rate * torch.einsum("n,n...->...", advantage, noise[key]) / pairs
        params[key] = leaf + step
    if generation % 5 == 4:
        print(f"generation {generation + 1}: mean loss {-means[-1]:.3f}")
assert means[-1] > means[0] + 0.05
