"""PEFT's folders as adapters: PEFT's own model is the oracle, for outputs and for gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft_folders import (
    FOLDERS,
    QUIET,
    REBASED,
    assert_close,
    compiled,  # noqa: F401  (a fixture)
    logits,
    output,
    over_folders,
    written,
)
from safetensors.torch import load_file
from torch import Tensor

import lora_func as lf
from lora_func.interop.peft import load
from lora_func.interop.peft.save import exported

pytestmark = QUIET


@over_folders
def test_load(name, tmp_path):
    model, theirs, batch = written(name, tmp_path)
    adapter, params = load(tmp_path, model)
    expected = output(theirs, batch)
    assert (expected - output(model, batch)).abs().max() > 1e-4 * expected.abs().max()
    assert_close(logits(adapter(model, params, batch)), expected)


# Of the gradients, these are not PEFT's: its C3A has another than its function in the input, which
# reaches earlier layers. Its BOFT trains two copies of each angle. The folder holds A and B alone.
OTHER_GRADIENTS = ("c3a", "boft", "boft, two", *REBASED)


def by_their_keys(adapter: lf.Adapter, grads: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Gradients under the names of PEFT's parameters.

    What `save` does to parameters is affine: what it does to zeros taken away, it maps gradients.
    """
    zeros = {key: torch.zeros_like(leaf) for key, leaf in grads.items()}
    weights = adapter.weights(model)
    given, start = (exported(adapter, p, weights, model)[1] for p in (grads, zeros))
    return {key: given[key] - start[key] for key in given if given[key].is_floating_point()}


def theirs_rows(theirs: Any) -> list[int]:
    config = theirs.peft_config["default"]
    rows = getattr(config, "token_indices", None) or config.trainable_token_indices
    return rows if isinstance(rows, list) else next(iter(rows.values()))


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in OTHER_GRADIENTS])
def test_gradients(name, tmp_path):
    model, theirs, batch = written(name, tmp_path)
    adapter, params = load(tmp_path, model)
    weights = torch.randn_like(output(model, batch))

    def loss(p):
        return (logits(adapter(model, p, batch)) * weights).sum()

    found = by_their_keys(adapter, torch.func.grad(loss)(params), model)
    (output(theirs, batch) * weights).sum().backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.grad is not None:
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    before = load_file(tmp_path / "adapter_model.safetensors")
    after = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    trained = [key for key in after if not torch.equal(before[key], after[key])]
    assert trained
    for key in trained:
        place, *_ = key.partition(".token_adapter")
        place = place.removesuffix(".trainable_tokens_delta")
        if place == key:
            assert_close(found[key], after[key], 1e-4)
        else:
            names = (f"{place}.weight", f"{place}.ln_tuning_layers.weight")
            own = next(found[name] for name in names if name in found)
            assert_close(own[theirs_rows(theirs)], after[key], 1e-4)
