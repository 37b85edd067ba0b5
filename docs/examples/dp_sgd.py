"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133): clip the gradient of every example, add noise.

This takes two lines more than SGD.
"""

import torch
from toy import counting, language_model, loss_per_example

import lora_func as lf

clip = 1.0  # largest norm of an example's gradient
noise = 0.5  # standard deviation of the noise in the sum of gradients, in multiples of clip
rate = 0.5
model, ids = language_model(), counting(16)
adapted_forward, params = lf.adapt(model, lf.LoRA(r=4))
generator = torch.Generator().manual_seed(0)


def loss(each, ids):
    return loss_per_example(adapted_forward(model, each, {"input_ids": ids}).logits, ids).sum()


for step in range(20):
    each = lf.expand(params, len(ids))  # leaves [16, *shape], one adapter for each example
    value, grads = lf.value_and_grad(loss)(each, ids)
    leaf_norms = [grad.flatten(1).norm(dim=1) for grad in grads.values()]
    norms = torch.stack(leaf_norms).norm(dim=0)  # [16]
    factors = (clip / norms).clamp(max=1)
    for key, grad in grads.items():
        total = torch.einsum("n,n...->...", factors, grad)
        total += clip * noise * torch.randn(total.shape, generator=generator)
        params[key] = params[key] - rate * total / len(ids)
    mean = value / len(ids)
    if step % 5 == 4:
        print(f"step {step + 1}: loss {mean:.3f}, largest norm before clipping {norms.max():.2f}")
assert mean < 4.1  # chance is log(64) = 4.16
