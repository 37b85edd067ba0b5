"""DPO (Rafailov et al. 2023, arXiv 2305.18290): the reference policy is the base model itself.

The adapted model and its base are two functions of the same weights. So there is no second copy,
and no adapter to switch off.
"""

import torch
import torch.nn.functional as F
from toy import counting, language_model, loss_per_example

import lora_func as lf

beta = 0.1
model = language_model()
# From the same starts: chosen sequences count by one, rejected ones by two.
both = torch.cat([counting(8, step=1), counting(8, step=2)])
adapted_forward, params = lf.adapt(model, lf.LoRA(r=4), generator=torch.Generator().manual_seed(0))


def log_likelihood(logits):
    return -loss_per_example(logits, both) * (both.shape[1] - 1)


with torch.no_grad():
    reference = log_likelihood(model(both).logits)


def loss(params):
    gained = log_likelihood(adapted_forward(model, params, both).logits) - reference
    margin = beta * (gained[:8] - gained[8:])
    return -F.logsigmoid(margin).mean(), margin


leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
optimizer = torch.optim.AdamW(leaves.values(), lr=3e-3)
for step in range(20):
    value, margin = loss(leaves)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    preferred = (margin > 0).float().mean()
    if step % 5 in (0, 4):
        print(f"step {step}: loss {value:.3f}, preferred in {preferred:.0%} of the pairs")
assert preferred == 1
