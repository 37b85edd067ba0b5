"""GRPO: reinforcement learning without a value network or a second model.

Use it where a program can score an answer (DeepSeekMath, Shao et al. 2024,
arXiv 2402.03300). The reference policy of the KL term is the base itself:
`model(ids)`, another function of the same weights. So there is no copy, and no
adapter to switch off.

    advantage = (reward - mean of its group) / deviation of its group
    loss = -(ratio · advantage - β · KL(policy || base))

The reward here is the share of even tokens in a completion.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from toy import counting, language_model

import lora_func as lf

torch.manual_seed(0)  # for sampling
prompts, group, length, beta = 4, 16, 4, 0.1
model = language_model(initializer_range=0.1)  # it has preferences
adapted_forward, params = lf.adapt(model, lf.LoRA(r=8))
leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
optimizer = torch.optim.AdamW(leaves.values(), lr=1e-2, weight_decay=0.0)
options = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
options |= {"do_sample": True, "top_k": 0}


def log_probability(logits, ids):
    """Of each token of the completions, `[prompts x group, 8]`."""
    logits, sampled = logits[:, length - 1 : -1], ids[:, length:]
    return -F.cross_entropy(logits.mT, sampled, reduction="none")


rewards, distances = [], []
for iteration in range(40):
    asked = counting(prompts, length=length, seed=iteration)
    asked = asked.repeat_interleave(group, dim=0)
    policy = lf.bind(adapted_forward, model, leaves)
    with torch.no_grad():
        mask = torch.ones_like(asked)
        ids = policy.generate(asked, attention_mask=mask, **options)
        reference = log_probability(model(ids).logits, ids)

    reward = (ids[:, length:] % 2 == 0).float().mean(1)
    grouped = reward.unflatten(0, (prompts, group))
    centred = grouped - grouped.mean(1, keepdim=True)
    advantage = centred / (grouped.std(1, keepdim=True) + 1e-4)

    logits = adapted_forward(model, leaves, {"input_ids": ids}).logits
    own = log_probability(logits, ids)
    ratio = (own - own.detach()).exp()  # 1: one step for each sample
    kl = (reference - own).exp() - (reference - own) - 1
    loss = -(ratio * advantage.reshape(-1, 1) - beta * kl).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    rewards.append(reward.mean().item())
    distances.append(kl.mean().item())

for i in range(0, 40, 10):
    reward, kl = (sum(each[i : i + 10]) / 10 for each in (rewards, distances))
    print(f"iterations {i + 1} to {i + 10}: reward {reward:.2f}, KL {kl:.1f}")
assert sum(rewards[-10:]) > sum(rewards[:10]) + 1.5

figure, axes = plt.subplots()
axes.plot(rewards, label="reward: the share of even tokens")
axes.plot(distances, label="KL to the base, nats a token")
axes.set(xlabel="iteration", ylim=(0, None))
axes.legend()
figure.savefig("grpo.png")
