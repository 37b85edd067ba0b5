"""Laplace: how sure is the next token?

Use it to get error bars for an adapter that is trained already (Yang et al.
2023, arXiv 2308.13111). This is the linearised posterior with a diagonal Fisher
matrix F, a mean of squared per-sample gradients:

    variance of a logit = J diag(1 / (n F + prior)) Jᵀ

J is the gradient of the logit in the flat dict.
"""

import torch
from toy import counting, language_model, loss_per_example

import lora_func as lf

prior = 10.0  # precision of N(0, 1/prior) on every parameter
model, ids = language_model(), counting(32)
adapted_forward, params = lf.adapt(
    model, lf.LoRA(r=2), generator=torch.Generator().manual_seed(0)
)


def loss(each, ids):
    logits = adapted_forward(model, each, {"input_ids": ids}).logits
    return loss_per_example(logits, ids).sum()


leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
optimizer = torch.optim.Adam(leaves.values(), lr=1e-2)
for _ in range(40):
    optimizer.zero_grad()
    loss(leaves, ids).div(len(ids)).backward()
    optimizer.step()
params = {key: leaf.detach() for key, leaf in leaves.items()}

# n F + prior, in the shape of each leaf
_, grads = lf.value_and_grad(loss)(lf.expand(params, len(ids)), ids)
precision = {key: prior + grad.square().sum(0) for key, grad in grads.items()}


def next_logits(params, ids):
    batch = {"input_ids": ids[None]}
    return adapted_forward(model, params, batch).logits[0, -1]


def deviation(ids):
    """Standard deviation of the logit of the most likely next token."""
    best = next_logits(params, ids).argmax()
    jacobian = torch.func.grad(lambda p: next_logits(p, ids)[best])(params)
    variances = [
        (jacobian[key].square() / precision[key]).sum() for key in params
    ]
    return torch.stack(variances).sum().sqrt().item()


generator = torch.Generator().manual_seed(1)
known = deviation(ids[0])
unknown = deviation(torch.randint(64, (16,), generator=generator))
print(f"deviation of the top logit on a training sequence: {known:.2f}")
print(f"deviation of the top logit on random tokens: {unknown:.2f}")
assert known < unknown
