"""DP-SGD: clip the gradient of each example, and add noise.

Use it where the data are private (Abadi et al. 2016, arXiv 1607.00133). One
backward gives the gradient of each example, so private training takes three
lines more than SGD:

    θ ← θ - η / n · (Σ gᵢ · min(1, C / |gᵢ|) + C σ N(0, 1))
"""

import torch
from toy import counting, language_model, loss_per_example

import lora_func as lf

clip = 1.0  # C: the largest norm of an example's gradient
noise = 0.5  # σ: the deviation of the noise in the sum, in multiples of clip
rate = 0.5
model, ids = language_model(), counting(16)
adapted_forward, params = lf.adapt(
    model, lf.LoRA(r=4), generator=torch.Generator().manual_seed(0)
)
generator = torch.Generator().manual_seed(0)


def loss(each, ids):
    logits = adapted_forward(model, each, {"input_ids": ids}).logits
    return loss_per_example(logits, ids).sum()


for step in range(1, 21):
    # Leaves [16, *shape]: an adapter for each example.
    each = lf.expand(params, len(ids))
    value, grads = lf.value_and_grad(loss)(each, ids)
    leaf_norms = [grad.flatten(1).norm(dim=1) for grad in grads.values()]
    norms = torch.stack(leaf_norms).norm(dim=0)  # [16]
    factors = (clip / norms).clamp(max=1)
    for key, grad in grads.items():
        total = torch.einsum("n,n...->...", factors, grad)
        total += clip * noise * torch.randn(total.shape, generator=generator)
        params[key] = params[key] - rate * total / len(ids)
    mean, largest = value / len(ids), norms.max()
    if step % 5 == 0:
        print(f"step {step:2d}: loss {mean:.2f}, largest norm {largest:.1f}")
assert mean < 4.1  # chance is log(64) = 4.16
