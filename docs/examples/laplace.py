"""Laplace over an adapter (Yang et al. 2023, arXiv 2308.13111), diagonal and linearised: how sure is it of its next token?

The Fisher diagonal is a mean of squared per-sample gradients; the variance of a logit is J diag(1 / (n F + prior)) Jᵀ, with
J the Jacobian of the logits in the flat dict.
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

_, grads = lf.value_and_grad(loss)(lf.expand(params, len(ids)), ids)
precision = {
    key: prior + grad.square().sum(0) for key, grad in grads.items()
}  # n F + prior, a leaf's shape each


def deviation(ids):
    """Standard deviation of the logit of the most likely next token."""

    def top(params):
        logits = adapted_forward(model, params, {"input_ids": ids[None]}).logits[0, -1]
        return logits[best]

    best = adapted_forward(model, params, {"input_ids": ids[None]}).logits[0, -1].argmax()
    jacobian = torch.func.grad(top)(params)
    return sum((jacobian[key].square() / precision[key]).sum() for key in params).sqrt()


generator = torch.Generator().manual_seed(1)
known, unknown = ids[0], torch.randint(64, (16,), generator=generator)
print(
    f"deviation of the top logit: {deviation(known):.3f} on a training sequence, {deviation(unknown):.3f} on random tokens"
)
assert deviation(known) < deviation(unknown)
