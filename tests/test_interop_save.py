"""Our adapters as PEFT's folders: PEFT's own model is the oracle."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import CASES, data_for
from models import text_batch, tiny_llama, trained
from peft_folders import (
    LAYERS,
    QUIET,
    REBASED,
    assert_close,
    compiled,  # noqa: F401  (a fixture)
    gpt2,
    logits,
    output,
    over_folders,
    written,
)
from safetensors.torch import load_file
from torch import nn

import lora_func as lf
from lora_func.interop.peft import load, save
from lora_func.interop.peft.methods import METHODS

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


def test_every_method_of_the_cards():
    """What PEFT has by its card can be written, but for what starts from data and an anchor."""
    cards = {kind for kind in lf.VARIANTS.values() if kind.card.peft is not None}
    assert cards - {method.kind for method in METHODS} == {lf.CorDA, lf.LoRAGA}


# Adapters with something special


def there(
    folder: Path, adapter: lf.Adapter, params: Any, model: Any, known: bool = True
) -> dict[str, Any]:
    """Saves, compares with PEFT, and returns the config. `known`: `save` is given the model."""
    save(folder, adapter, params, model=model if known else None)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    batch = torch.randn(3, 8) if isinstance(model, Named) else text_batch()
    assert_close(output(theirs, batch), logits(adapter(model, params, batch)))
    return json.loads((folder / "adapter_config.json").read_text())


class Named(nn.Module):
    """Layers whose paths end alike: q, z.q and a.q; z.q1 for PEFT's IA3."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.z = nn.ModuleDict({"q": nn.Linear(8, 8), "q1": nn.Linear(8, 8)})
        self.a = nn.ModuleDict({"q": nn.Linear(8, 8)})

    def forward(self, x):
        x = torch.tanh(self.q(x))
        return self.a["q"](torch.tanh(self.z["q1"](torch.tanh(self.z["q"](x)))))


@pytest.mark.parametrize("known", [True, False], ids=["model", ""])
def test_layers_whose_names_end_alike(known, tmp_path):
    """Each rank and each alpha finds its layer, in whatever order PEFT looks."""
    model = Named()
    ranks = {"^q$": (2, 3.0), "^z.q$": (4, 8.0), "a.q": (4, 5.0), "q1": (4, 8.0)}
    rules = {name: lf.LoRA(r=r, alpha=alpha) for name, (r, alpha) in ranks.items()}
    adapter, params = lf.adapt(model, rules)
    config = there(tmp_path / "all", adapter, trained(params), model, known)
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    again: Any = load(tmp_path / "all", model)[0]
    assert {path: (v.r, v.alpha) for path, v in again.variants.items()} == {
        "q": (2, 3),
        "z.q": (4, 8),
        "z.q1": (4, 8),
        "a.q": (4, 5),
    }


def test_a_name_that_ends_another(tmp_path):
    """PEFT would adapt z.q and a.q too. Only the model tells."""
    model = Named()
    adapter, params = lf.adapt(model, {"^q$": lf.LoRA(r=2)})
    with pytest.raises(lf.LoraFuncError, match=r"would adapt 'z\.q', 'a\.q' too"):
        save(tmp_path / "one", adapter, params, model=model)
    adapter, params = lf.adapt(model, {r"z\.q$": lf.LoRA(r=2)})
    config = there(tmp_path / "other", adapter, trained(params), model)
    assert config["target_modules"] == ["z.q"]


def test_exceptions_that_peft_cannot_tell_apart(tmp_path):
    """Its patterns for C3A need a dot before the name, so q there is also z.q."""
    model = Named()
    rules = {"^q$": lf.C3A(block_size=2), r"(z|a)\.q": lf.C3A(block_size=4)}
    adapter, params = lf.adapt(model, rules)
    with pytest.raises(lf.LoraFuncError, match="cannot tell"):
        save(tmp_path / "new", adapter, params)


def test_ia3_of_both_kinds(tmp_path):
    model = tiny_llama()
    rules = {"k_proj$": lf.IA3(), "down_proj$": lf.IA3FF(), r"0.*o_proj$": lf.IA3FF()}
    adapter, params = lf.adapt(model, rules)
    config = there(tmp_path / "new", adapter, trained(params), model)
    assert config["feedforward_modules"] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    ]
    model = Named()
    adapter, params = lf.adapt(model, {"^q$": lf.IA3FF(), r"z\.q$": lf.IA3()})
    with pytest.raises(lf.LoraFuncError, match="PEFT tells IA3FF from IA3 by the ends of paths"):
        save(tmp_path / "alike", adapter, params)


def test_full_beside_lora(tmp_path):
    """Heads, norms, embeddings and biases leave whole."""
    model = gpt2()
    rules = {
        "c_attn$": lf.LoRA(r=2),
        r"c_attn\.bias$": lf.Full(),
        r"ln_f\.weight$": lf.Full(),
        "wpe$": lf.Full(),
    }
    adapter, params = lf.adapt(model, rules)
    params = trained(params)
    config = there(tmp_path / "new", adapter, params, model)
    assert config["bias"] == "lora_only"
    assert set(config["modules_to_save"]) == {"transformer.wpe", "transformer.ln_f"}
    adapter, params = lf.adapt(model, {"c_attn$": lf.VeRA(r=2), r"c_attn\.bias$": lf.Full()})
    with pytest.raises(lf.LoraFuncError, match="both an adapter and a Full, which VERA"):
        save(tmp_path / "vera", adapter, params, model=model)


def test_full_alone(tmp_path):
    """PEFT's LN tuning keeps whole modules of any kind."""
    model = tiny_llama()
    adapter, params = lf.adapt(model, {"lm_head$": lf.Full(), r"\.norm\.weight$": lf.Full()})
    config = there(tmp_path / "new", adapter, trained(params), model)
    assert config["peft_type"] == "LN_TUNING"


REFUSED = {
    "lora and dora": ({"q_proj$": lf.LoRA(), "v_proj$": lf.DoRA()}, r"LORA \(DoRA, use_dora=True"),
    "lora and oft": ({"q_proj$": lf.LoRA(), "v_proj$": lf.OFT(block_size=4)}, "holds one method"),
    "two scales": (
        {"q_proj$": lf.LoRA(), "v_proj$": lf.LoRA(rslora=True)},
        "one use_rslora for all layers",
    ),
    "two ranks": (
        {"q_proj$": lf.AdaLoRA(r=2), "v_proj$": lf.AdaLoRA(r=3)},
        "one init_r for all layers",
    ),
    "pissa": ({"q_proj$": lf.PiSSA(r=2)}, r"rewritten base.*lf\.as_lora"),
    "milora": ({"q_proj$": lf.MiLoRA(r=2)}, r"PEFT does not have it.*lf\.as_lora"),
    "antipasto": ({"q_proj$": lf.AntiPaSTO(r=2)}, r"PEFT does not have it.*lf\.as_lora"),
    "delora": ({"q_proj$": lf.DeLoRA(r=2, start="paper")}, r"frozen copy.*lf\.as_lora"),
    "vblora": (
        {"q_proj$": lf.VBLoRA(r=2, num_vectors=6, vector_length=4)},
        r"frozen copy.*lf\.as_lora",
    ),
    "fourierft": ({"q_proj$": lf.FourierFT(n=5)}, "PEFT draws those of FourierFT from a seed"),
    "a parameter": ({r"q_proj\.weight$": lf.DoRA(r=2)}, "PEFT has only a plain LoRA of matrices"),
    "an embedding": ({"embed_tokens$": lf.LoHa(r=2)}, "only a plain LoRA can be exchanged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    """Nothing is written."""
    model, (rules, why) = tiny_llama(), REFUSED[name]
    adapter, params = lf.adapt(model, rules)
    with pytest.raises(lf.LoraFuncError, match=why):
        save(tmp_path / "new", adapter, params, model=model)
    assert not (tmp_path / "new").exists()


def test_population(tmp_path):
    """Each member is a folder of its own."""
    model = tiny_llama()
    adapter, params = lf.adapt(model, lf.LoRA(r=2))
    population = lf.stack([trained(params), trained(params)])
    with pytest.raises(lf.LoraFuncError, match=r"lf\.unstack\(params\)\[0\]"):
        save(tmp_path / "new", adapter, population)
    for k, member in enumerate(lf.unstack(population)):
        there(tmp_path / str(k), adapter, member, model)


def test_ranks_that_data_found(tmp_path):
    """EVA's layers have ranks of their own, and one scale."""
    model = tiny_llama()
    batches = [text_batch() for _ in range(3)]
    adapter, params = lf.adapt(model, lf.EVA(r=3, rho=2.0), targets=EVERY, calibration=batches)
    config = there(tmp_path / "new", adapter, trained(params), model)
    assert len(set(config["rank_pattern"].values()) | {config["r"]}) > 1


def test_what_makes_up_for_quantization(tmp_path):
    """LoftQ's is a LoRA on the base that it was made for."""
    model, variant = tiny_llama(), lf.LoftQ(r=2)
    adapter, params = lf.adapt(model, variant, targets=EVERY, **data_for(variant, model, EVERY))
    there(tmp_path / "new", adapter, trained(params), model)


def test_a_folder_is_replaced(tmp_path):
    """The files are those of the last save that succeeded."""
    model = tiny_llama()
    adapter, params = lf.adapt(model, lf.LoRA(r=2))
    there(tmp_path, adapter, trained(params), model)
    other, moved = lf.adapt(model, lf.LoRA(r=3, alpha=2.0))
    there(tmp_path, other, trained(moved), model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(lf.LoraFuncError):
        save(tmp_path, *lf.adapt(model, lf.PiSSA(r=2)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("alpha", [16.0, 2.0], ids=["same config", "another"])
def test_an_interrupted_save(alpha, calls, tmp_path, monkeypatch):
    """The folder is the old adapter or the new one, or has no config."""
    model = tiny_llama()
    adapter, params = lf.adapt(model, lf.LoRA(r=2))
    save(tmp_path, adapter, trained(params))
    old = load(tmp_path, model)[1]
    done = []

    def interrupted(path, content):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(path)
        path.write_bytes(content)

    monkeypatch.setattr(sys.modules[save.__module__], "replace_file", interrupted)
    other, new = lf.adapt(model, lf.LoRA(r=2, alpha=alpha))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, other, trained(new))
    if alpha == 16.0:
        found = load(tmp_path, model)[1]
        assert all(torch.equal(found[key], old[key]) for key in old) == (calls == 0)
    else:
        with pytest.raises(lf.LoraFuncError, match=r"no adapter_config\.json"):
            load(tmp_path, model)


def test_a_path_that_is_no_folder(tmp_path):
    adapter, params = lf.adapt(tiny_llama(), lf.LoRA(r=2))
    (tmp_path / "file").write_text("")
    with pytest.raises(lf.LoraFuncError, match="is a file, where a folder would stand"):
        save(tmp_path / "file", adapter, params)
    with pytest.raises(lf.LoraFuncError, match="make it first"):
        save(tmp_path / "no" / "folder", adapter, params)
    with pytest.raises(lf.LoraFuncError, match="must be of type Adapter"):
        save(tmp_path / "new", params, adapter)  # pyright: ignore


def test_dropout(tmp_path):
    model = tiny_llama()
    adapter, params = lf.adapt(model, lf.LoRA(r=2), dropout=0.25)
    assert there(tmp_path / "lora", adapter, params, model)["lora_dropout"] == 0.25
    adapter, params = lf.adapt(model, lf.LoHa(r=2), dropout=0.25)
    with pytest.warns(UserWarning, match="LOHA has none in PEFT"):
        there(tmp_path / "loha", adapter, params, model)


def test_what_servers_read(tmp_path):
    """The keys, and the fields of the config, by which vLLM and SGLang find a plain LoRA."""
    model = tiny_llama()
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=EVERY)
    config = there(tmp_path / "new", adapter, params, model)
    assert set(load_file(tmp_path / "new" / "adapter_model.safetensors")) == {
        f"base_model.model.{path}.lora_{part}.weight" for path in adapter.targets for part in "AB"
    }
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"]) == (2, 16)
    assert config["modules_to_save"] is None
    assert not config["use_dora"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
