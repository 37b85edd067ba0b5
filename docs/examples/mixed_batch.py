"""One batch of prompts and four adapters: one call of `generate` continues each with its own."""

import torch
from toy import counting, language_model

import lora_func as lf

model = language_model()
adapted_forward, params = lf.adapt(model, lf.DoRA(r=4))
users = [
    {key: leaf + 0.2 * torch.randn_like(leaf) for key, leaf in params.items()} for _ in range(4)
]

prompts, ids = counting(6, length=5), torch.tensor([3, 0, 0, 2, 1, 3])
served = lf.bind(adapted_forward, model, lf.select(lf.stack(users), ids))
options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
tokens = served.generate(prompts, attention_mask=torch.ones_like(prompts), **options)

for prompt, user, row in zip(prompts.split(1), ids.tolist(), tokens):
    alone = lf.bind(adapted_forward, model, users[user])
    expected = alone.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(row, expected[0])
    print(f"user {user}: {row[5:].tolist()}")
