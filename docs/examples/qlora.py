"""QLoRA: train through a base in 4 bits.

Use it where the weights of the base fill the memory (Dettmers et al. 2023,
arXiv 2305.14314). NF4 with double quantization takes 4.127 bits a number. There
is nothing to set: a quantized model is adapted like any other, its output does
not change at init, and every transform of torch.func passes it. It needs
`pip install bitsandbytes`.
"""

import tempfile

import torch
from toy import counting, language_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lora_func as lf

packing = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
with tempfile.TemporaryDirectory() as folder:  # your model has a name instead
    language_model(intermediate_size=128).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=packing, device_map="cpu"
    )
adapted_forward, params = lf.adapt(
    model, lf.LoRA(r=8), generator=torch.Generator().manual_seed(0)
)
batch = {"input_ids": counting(16), "labels": counting(16)}
with torch.no_grad():
    adapted = adapted_forward(model, params, batch).logits
    assert torch.equal(adapted, model(**batch).logits)

leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
optimizer = torch.optim.AdamW(leaves.values(), lr=1e-2)
losses = []
for _ in range(40):
    loss = adapted_forward(model, leaves, batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

kinds = {
    type(model.get_submodule(path)).__name__ for path in adapted_forward.targets
}
print(f"{len(adapted_forward.targets)} layers of {', '.join(kinds)}")
print(f"loss {losses[0]:.1f} before, {losses[-1]:.1f} after")
assert losses[-1] < losses[0] - 0.5
