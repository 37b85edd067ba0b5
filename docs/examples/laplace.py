"""Laplace over an adapter (Yang et al. 2023, arXiv 2308.13111): how sure is the next token?

Diagonal and linearised. The Fisher diagonal F is a mean of squared per-sample gradients. The
variance of a logit is J diag(1 / (n F + prior)) Jᵀ, with J its Jacobian in the flat dict.
"""

import torch
from toy import counting, language_model, loss_per_example

import lora_func as lf

prior = 10.0  # precision of N(0, 1/prior) on every parameter
model, ids = language_model(), counting(32)
adapted_forward, params = lf.adapt(model, lf.LoRA(r=2), generator=torch.Generator().manual_seed(0))


def loss(each, ids):
    return loss_per_example(adapted_forward(model, each, {"input_ids": ids}).logits, ids).sum()


optimizer = torch.optim.Adam([leaf.requires_grad_() for leaf in params.values()], lr=1e-2)
for _ in range(40):
    optimizer.zero_grad()
    loss(params, ids).div(len(ids)).backward()
    optimizer.step()
params = {key: leaf.detach() for key, leaf in params.items()}

# n F + prior, in the shape of each leaf
_, grads = lf.value_and_grad(loss)(lf.expand(params, len(ids)), ids)
precision = {key: prior + grad.square().sum(0) for key, grad in grads.items()}


def deviation(ids):
    """Standard deviation of the logit of the most likely next token."""

    def top(params):
        logits = adapted_forward(model, params, {"input_ids": ids[None]}).logits[0, -1]
        return logits[best]

    best = adapted_forward(model, params, {"input_ids": ids[None]}).logits[0, -1].argmax()
    jacobian = torch.func.grad(top)(params)
    variances = [(jacobian[key].square() / precision[key]).sum() for key in params]
    return torch.stack(variances).sum().sqrt().item()


generator = torch.Generator().manual_seed(1)
known = deviation(ids[0])
unknown = deviation(torch.randint(64, (16,), generator=generator))
print(f"deviation of the top logit on a training sequence: {known:.3f}")
print(f"deviation of the top logit on random tokens: {unknown:.3f}")
assert known < unknown
