"""DPO: learn from preferences, with the base model as the reference.

Use it where you have pairs of a better and a worse answer (Rafailov et al.
2023, arXiv 2305.18290). The adapted model and its base are two functions of the
same weights. So there is no second copy, and no adapter to switch off.

    loss = -log σ(β · (gain of the chosen answer - gain of the rejected one))
    gain = log p(answer | adapted) - log p(answer | base)
"""

import torch
import torch.nn.functional as F
from toy import counting, language_model, loss_per_example

import lora_func as lf

beta = 0.1
model = language_model()
# From the same starts: chosen sequences count by one, rejected ones by two.
both = torch.cat([counting(8, step=1), counting(8, step=2)])
adapted_forward, params = lf.adapt(
    model, lf.LoRA(r=4), generator=torch.Generator().manual_seed(0)
)


def log_likelihood(logits):
    return -loss_per_example(logits, both) * (both.shape[1] - 1)


with torch.no_grad():
    reference = log_likelihood(model(both).logits)


def loss(params):
    logits = adapted_forward(model, params, {"input_ids": both}).logits
    gain = log_likelihood(logits) - reference
    margin = beta * (gain[:8] - gain[8:])
    return -F.logsigmoid(margin).mean(), margin


leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
optimizer = torch.optim.AdamW(leaves.values(), lr=3e-3)
for step in range(20):
    value, margin = loss(leaves)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    share = (margin > 0).float().mean()
    if step % 5 in (0, 4):
        print(f"step {step:2d}: loss {value:.2f}, preferred in {share:.0%}")
assert share == 1
