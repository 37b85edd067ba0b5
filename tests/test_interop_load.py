"""PEFT's folders as adapters: PEFT's own model is the oracle, for outputs and for gradients."""

from __future__ import annotations

import copy
import json
from typing import Any

import peft
import pytest
import torch
from models import state_of, text_batch, tiny_llama
from peft import LoraConfig
from peft_folders import (
    FOLDERS,
    LAYERS,
    QUIET,
    REBASED,
    assert_close,
    compiled,  # noqa: F401  (a fixture)
    logits,
    output,
    over_folders,
    randomized,
    written,
)
from safetensors.torch import load_file, save_file
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
    if "experts" not in name:  # whose kernels do not take float64, in which rounding hides nothing
        model, theirs = model.double(), theirs.double()
        params = {key: leaf.double() for key, leaf in params.items()}
        batch = batch.double() if isinstance(batch, Tensor) else batch
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
            assert_close(found[key], after[key])
        else:
            names = (f"{place}.weight", f"{place}.ln_tuning_layers.weight")
            own = next(found[name] for name in names if name in found)
            assert_close(own[theirs_rows(theirs)], after[key])


# Folders with something special


def rewritten(folder: Any, **fields: Any) -> None:
    """Changes fields of a config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def same(model: Any, folder: Any, theirs: Any, tolerance: float = 1e-5) -> Any:
    """Loads a folder and compares. Any: a type checker knows no field of a variant."""
    adapter, params = load(folder, model)
    batch = text_batch()
    assert_close(logits(adapter(model, params, batch)), output(theirs, batch), tolerance)
    return adapter


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model")
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_converted(init, tmp_path):
    """Saved as a plain LoRA, by PEFT's own conversion."""
    model = tiny_llama()
    config = LoraConfig(r=4, target_modules=LAYERS, init_lora_weights=init)
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    path = str(tmp_path / "start")
    theirs.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=path)
    adapter = same(model, tmp_path / "new", theirs.eval())
    assert {variant.r for variant in adapter.variants.values()} == {8}


def test_adapter_with_a_name(tmp_path):
    """PEFT puts it into a folder of its own."""
    model = tiny_llama()
    theirs = peft.get_peft_model(copy.deepcopy(model), LoraConfig(r=4), adapter_name="mine")
    theirs.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    theirs.save_pretrained(tmp_path)
    same(model, tmp_path / "mine", theirs.eval())
    theirs.set_adapter("second")
    adapter = same(model, tmp_path / "second", theirs)
    assert {v.r for v in adapter.variants.values()} == {2}
    with pytest.raises(lf.LoraFuncError, match="it has adapters in 'mine', 'second'"):
        load(tmp_path, model)


def test_without_the_prefix(tmp_path):
    """Other libraries write PEFT's format without it."""
    model, theirs, _ = written("lora", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {k.removeprefix("base_model.model."): t for k, t in load_file(path).items()}
    save_file(tensors, path)
    same(model, tmp_path, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    """Files in half precision become float32, as in PEFT."""
    model, _, _ = written("lora", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: t.to(dtype) for key, t in load_file(path).items()}, path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    same(model, tmp_path, again)
    _, params = load(tmp_path, model)
    assert {leaf.dtype for leaf in params.values()} == {torch.float32}


def test_ranks_of_an_allocator(tmp_path):
    """AdaLoRA's file lacks what the allocator took away, of one layer everything."""
    model = tiny_llama()
    config = peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=["q_proj"])
    theirs = randomized(config, model)
    path = "model.layers.{}.self_attn.q_proj.lora_E"
    ranks = {path.format(0): [True, False, True, False], path.format(1): [False] * 4}
    theirs.peft_config["default"].rank_pattern = ranks
    theirs.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    adapter = same(model, tmp_path, again)
    assert [v.r for v in adapter.variants.values()] == [2]


def test_eva(tmp_path):
    """It is a LoRA whose ranks came from data."""
    model, theirs, _ = written("lora", tmp_path)
    rewritten(tmp_path, init_lora_weights="eva", eva_config={"rho": 2.0})
    same(model, tmp_path, theirs)


def test_dropout(tmp_path):
    """LoRA's is the adapter's. One that acts elsewhere is left out with a warning."""
    model, theirs, _ = written("lora", tmp_path / "lora")
    rewritten(tmp_path / "lora", lora_dropout=0.3)
    assert same(model, tmp_path / "lora", theirs).dropout == 0.3
    model, theirs, _ = written("loha", tmp_path / "loha")
    rewritten(tmp_path / "loha", module_dropout=0.3)
    with pytest.warns(UserWarning, match="'module_dropout' acts in training alone"):
        assert same(model, tmp_path / "loha", theirs).dropout == 0
    model, theirs, _ = written("modules_to_save", tmp_path / "whole")
    rewritten(tmp_path / "whole", lora_dropout=0.3)
    with pytest.warns(UserWarning, match="it would also act on 'lm_head'"):
        assert same(model, tmp_path / "whole", theirs).dropout == 0
    model, _, _ = written("convolutions", tmp_path / "kernels")
    rewritten(tmp_path / "kernels", lora_dropout=0.3)
    with pytest.warns(UserWarning, match="does not act on the convolutions 'wide'"):
        load(tmp_path / "kernels", model)


def test_parts_of_the_model(tmp_path):
    """An adapter of a part, or of a whole that the part lacks, says onto what to load it."""
    model, _, batch = written("lora", tmp_path / "whole")
    with pytest.raises(lf.LoraFuncError, match="the part 'model' of the model"):
        load(tmp_path / "whole", model.model)
    inner = randomized(LoraConfig(r=4, target_modules=LAYERS), model.model)
    inner.save_pretrained(tmp_path / "inner")
    with pytest.raises(lf.LoraFuncError, match="its part 'model' has: load onto that"):
        load(tmp_path / "inner", model)
    adapter, params = load(tmp_path / "inner", model.model)
    ids = {"input_ids": batch["input_ids"]}
    given = adapter(model.model, params, ids).last_hidden_state
    assert_close(given, inner(**ids).last_hidden_state)


def test_the_model_is_not_touched(tmp_path):
    model, _, _ = written("pissa", tmp_path)
    before = state_of(model)
    load(tmp_path, model)
    assert state_of(model) == before


def test_load_of_our_own_files_names_this_one(tmp_path):
    model, _, _ = written("lora", tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(lf.LoraFuncError, match=r"lora_func\.interop\.peft\.load"):
            lf.load(path, model)


def test_training_goes_on(tmp_path):
    """What was loaded is like any adapter: it is saved, drawn anew and trained."""
    model, _, batch = written("pissa", tmp_path)
    adapter, params = load(tmp_path, model)
    lf.save(tmp_path / "own.safetensors", adapter, params)
    again, loaded = lf.load(tmp_path / "own.safetensors", model, check_base="error")
    out = adapter(model, params, batch).logits
    assert torch.equal(again(model, loaded, batch).logits, out)
    fresh = adapter.init(model)
    assert torch.equal(adapter(model, fresh, batch).logits, model(**batch).logits)
