"""Our adapters as PEFT's folders: PEFT's own model is the oracle."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from cases import CASES
from models import text_batch, tiny_llama, trained
from peft_folders import (
    LAYERS,
    QUIET,
    REBASED,
    assert_close,
    compiled,  # noqa: F401  (a fixture)
    logits,
    output,
    over_folders,
    written,
)

import lora_func as lf
from lora_func.interop.peft import load, save

pytestmark = QUIET


def layers_alone(adapter: lf.Adapter) -> bool:
    """Whether `save` needs no model."""
    parameters = any(base.tensor is not None for base in adapter.base.values())
    return not parameters and not any(type(v) is lf.Full for v in adapter.variants.values())


@over_folders
def test_there_and_back(name, tmp_path):
    """PEFT's adapter goes through our files and is the same again, with the model and without."""
    model, theirs, batch = written(name, tmp_path / "theirs")
    adapter, params = load(tmp_path / "theirs", model)
    for given in (model, None):
        if name in REBASED or (given is None and not layers_alone(adapter)):
            hint = "lf.as_lora" if name in REBASED else "model=model"
            with pytest.raises(lf.LoraFuncError, match=hint):
                save(tmp_path / "ours", adapter, params, model=given)
            continue
        save(tmp_path / "ours", adapter, params, model=given)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        assert_close(output(again, batch), output(theirs, batch))
        other, loaded = load(tmp_path / "ours", model)
        assert_close(logits(other(model, loaded, batch)), output(theirs, batch))


SAVED = {
    name: case
    for name, case in CASES.items()
    if case.peft is not None and name not in ("pissa", "pissa-rs", "olora", "fourierft", "vblora")
}
EVERY = lf.Targets(names=tuple(f"{name}$" for name in LAYERS))


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("known", [True, False], ids=["model", ""])
def test_save(name, known, tmp_path):
    """An adapter of ours, as PEFT's model."""
    model, batch = tiny_llama(), text_batch()
    adapter, params = lf.adapt(model, SAVED[name].variant(4), targets=EVERY)
    params = trained(params)
    save(tmp_path / "new", adapter, params, model=model if known else None, base="a/base")
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "a/base"
    assert config["target_modules"] == (sorted(LAYERS) if known else sorted(adapter.targets))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "new").eval()
    expected = adapter(model, params, batch).logits
    assert (expected - model(**batch).logits).abs().max() > 1e-4 * expected.abs().max()
    assert_close(theirs(**batch).logits, expected)

    again, loaded = load(tmp_path / "new", model)
    assert again.targets == adapter.targets
    assert_close(again(model, loaded, batch).logits, expected)
    for key, leaf in loaded.items():
        torch.testing.assert_close(leaf, params[key])
