"""The core where nothing but torch is installed: adapt, train, save and load. `nox -s build`."""

import importlib.util

import torch

import lora_func as lf

assert "site-packages" in str(lf.__file__), f"{lf.__file__} is not what was installed"
assert importlib.util.find_spec("transformers") is None, "this environment has more than torch"

model, batch = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.ones(2, 4)
adapted_forward, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(roles=()))
assert torch.equal(adapted_forward(model, params, batch), model(batch))

grads = torch.func.grad(lambda p: adapted_forward(model, p, batch).sum())(params)
params = {key: leaf - grads[key] for key, leaf in params.items()}
lf.save("adapter.safetensors", adapted_forward, params)
loaded, again = lf.load("adapter.safetensors", model)
assert torch.equal(loaded(model, again, batch), adapted_forward(model, params, batch))
assert not torch.equal(loaded(model, again, batch), model(batch))
print(f"lora_func {lf.__version__} works with torch {torch.__version__} alone")
