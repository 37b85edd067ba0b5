"""Folders that are no adapter, or not whole: each is refused with its reason, by name."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import tiny_llama
from peft import LoraConfig
from peft_folders import QUIET, compiled, gpt2, randomized, written  # noqa: F401  (a fixture)
from safetensors.torch import load_file, save_file

import lora_func as lf
from lora_func.interop.peft import load

pytestmark = QUIET
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def config(**fields: Any) -> Callable[[Path], None]:
    """Changes fields of the config."""

    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def text(content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "adapter_config.json").write_text(content)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Changes the tensors."""

    def rewrite(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return rewrite


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "no adapter_config.json in it"),
    "no tensors": (
        lambda d: (d / "adapter_model.safetensors").unlink(),
        "no adapter_model.safetensors in it",
    ),
    "a pickle": (pickled, "is a pickle, which may run code"),
    "cut": (cut, "not a whole safetensors file"),
    "no JSON": (text("{"), "is not JSON"),
    "another encoding": (
        lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe\x00"),
        "is not JSON",
    ),
    "deep JSON": (text("[" * 100_000), "is not JSON"),
    "a list": (text("[]"), "has no peft_type"),
    "no type": (config(peft_type=None), "has no peft_type"),
    "unknown type": (config(peft_type="LORAX"), "'LORAX' is none that lora_func has. Did you mean"),
    "prompts": (config(peft_type="PREFIX_TUNING"), "put before the input"),
    "xlora": (config(peft_type="XLORA"), "load each LoRA by itself"),
    "corda": (config(init_lora_weights="corda"), "path_initial_model_for_weight_conversion"),
    "lora-ga": (config(init_lora_weights="lora_ga"), "rewrites by gradients"),
    "loftq": (config(init_lora_weights="loftq"), "set init_lora_weights to true"),
    "pissa, dora": (config(init_lora_weights="pissa", use_dora=True), "cannot be read"),
    "aLoRA": (config(alora_invocation_tokens=[7]), "adapted_forward.* active=mask"),
    "an option": (config(use_qalora=True), "use_qalora=True cannot be read: lora_func has no such"),
    "a new option": (config(use_new=3), "use_new=3 cannot be read"),
    "rank 0": (config(r=0), "r must be"),
    "rank in words": (config(r="four"), "r must be"),
    "another rank": (config(r=8), "has shape .* which is not that of LoRA"),
    "no scale": (config(lora_alpha=0), "alpha must be"),
    "infinite scale": (config(lora_alpha=1e999), "alpha must be"),
    "exceptions": (config(rank_pattern=[4]), "rank_pattern is "),
    "no regex": (config(rank_pattern={"(": 4}), "not a regular expression"),
    "no regex for targets": (config(target_modules="("), "not a regular expression"),
    "targets": (config(target_modules=3), "target_modules is 3"),
    "layers": (config(layers_to_transform="all"), "layers_to_transform is 'all'"),
    "dropout": (config(lora_dropout=2), "no probability"),
    "more targets": (config(target_modules=["q_proj", "o_proj"]), "has nothing for them"),
    "a missing tensor": (
        tensors(lambda t: t.pop(f"{Q}.lora_B.weight")),
        r"layers\.0\.self_attn\.q_proj': the file lacks its tensor 'lora_B.weight'",
    ),
    "a missing layer": (
        tensors(lambda t: [t.pop(f"{Q}.lora_{part}.weight") for part in "AB"]),
        r"names 'model\.layers\.0\.self_attn\.q_proj', and .* has nothing for them",
    ),
    "an empty file": (tensors(lambda t: t.clear()), "has nothing for them"),
    "another tensor": (
        tensors(lambda t: t.update({f"{Q}.lora_C.weight": torch.ones(3)})),
        "unexpected tensor .*lora_C",
    ),
    "another layer": (
        tensors(lambda t: t.update({"base_model.model.other.lora_A.weight": torch.ones(4, 2)})),
        "has no layer 'other'",
    ),
    "another bias": (
        tensors(lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(48)})),
        "has a tensor 'lora_B.bias', which",
    ),
    "a turned tensor": (
        tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(32, 4)})),
        r"'lora_A.weight' has shape \(32, 4\)",
    ),
    "a number": (
        tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.tensor(1.0)})),
        r"'lora_A.weight' has shape \(\)",
    ),
    "integers": (
        tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int)})),
        "floating|float32",
    ),
    "another vocabulary": (
        tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(65, 32)})),
        "Give the model the same vocabulary",
    ),
    "a layer of another kind": (
        tensors(lambda t: t.update({"base_model.model.model.lora_A.weight": torch.ones(4, 2)})),
        "is a LlamaModel, which is no linear layer",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name, tmp_path):
    model, _, _ = written("lora", tmp_path)
    change, why = WRONG[name]
    change(tmp_path)
    with pytest.raises(lf.LoraFuncError, match=f"(?s){tmp_path.name}.*{why}"):
        load(tmp_path, model)


@pytest.mark.parametrize("kind", [kind.value for kind in peft.PeftType])
def test_every_type_of_peft(kind, tmp_path):
    """Each is read, or refused; here the tensors are always those of a LoRA."""
    model, _, _ = written("lora", tmp_path)
    config(peft_type=kind)(tmp_path)
    if kind == "LORA":
        load(tmp_path, model)
        return
    with pytest.raises(lf.LoraFuncError):
        load(tmp_path, model)


VALUES = [None, True, -1, 2.5, 1e400, "x", [3], [[]], {"q_proj": "x"}]


@pytest.mark.filterwarnings("ignore:.*acts in training alone")
def test_any_value_in_a_config(tmp_path):
    """Whatever a field holds, the folder is read or refused."""
    for shift, name in enumerate(("lora", "adalora", "ia3", "vera", "oft", "lokr", "tinylora")):
        folder = tmp_path / name
        model, _, _ = written(name, folder)
        path = folder / "adapter_config.json"
        good = json.loads(path.read_text())
        refused = 0
        for position, field in enumerate(good):
            for start in (0, 4):  # two values for each field, others for each method
                value = VALUES[(position + start + shift) % len(VALUES)]
                path.write_text(json.dumps({**good, field: value}))
                try:
                    load(folder, model)
                except lf.LoraFuncError:
                    refused += 1
        assert refused


OTHER = {
    "vera": ({"base_model.vera_A": torch.ones(3, 32)}, "'vera_A' has shape"),
    "vblora": ({"base_model.vblora_vector_bank": None}, "lacks 'vblora_vector_bank'"),
    "randlora": ({"base_model.randlora_B": None}, "lacks 'randlora_B'"),
    "tinylora": ({"base_model.tinylora_v.3": None}, "lacks its tensor 'tinylora_v'"),
    "shira": ({f"{Q}.shira_indices": torch.ones(3)}, "shira_indices|'rows'"),
    "ia3": ({f"{Q}.ia3_l": torch.ones(48)}, "'ia3_l' has shape"),
    "boft": ({f"{Q}.boft_R": torch.ones(1, 8, 4)}, "boft_R|cannot"),
    "oft": ({f"{Q}.oft_R.weight": torch.ones(8, 7)}, "oft_R"),
    "tokens": (
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(3)},
        "35 trainable token indices",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_methods(name, tmp_path):
    model, _, _ = written(name, tmp_path)
    changes, why = OTHER[name]

    def change(found):
        for key, tensor in changes.items():
            del found[key]
            if tensor is not None:
                found[key] = tensor

    tensors(change)(tmp_path)
    with pytest.raises(lf.LoraFuncError, match=why):
        load(tmp_path, model)


def test_other_models(tmp_path):
    written("lora", tmp_path)
    with pytest.raises(lf.LoraFuncError, match="GPT2LMHeadModel has no layer"):
        load(tmp_path, gpt2())
    with pytest.raises(lf.LoraFuncError, match=r"has shape \(4, 32\).* weight of shape \(48, 40\)"):
        load(tmp_path, tiny_llama(hidden_size=40))
    deeper = tiny_llama()
    deeper.model.layers.append(copy.deepcopy(deeper.model.layers[0]))
    with pytest.raises(lf.LoraFuncError, match="has nothing for them"):
        load(tmp_path, deeper)


@pytest.mark.filterwarnings("ignore:.*nested tensor")
def test_torch_attention(tmp_path):
    """PEFT rewrites its weights before each call, and has keys for its parts."""
    model = torch.nn.TransformerEncoderLayer(8, 2, 16)
    theirs = randomized(LoraConfig(r=4, target_modules=["self_attn"]), model)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(lf.LoraFuncError, match="'self_attn' is a MultiheadAttention"):
        load(tmp_path, model)


def test_arguments(tmp_path):
    model = tiny_llama()
    with pytest.raises(lf.LoraFuncError, match="takes a path and a module"):
        load(model, tmp_path)  # pyright: ignore
    with pytest.raises(lf.LoraFuncError, match="there is no folder"):
        load(tmp_path / "none", model)


def test_tied_tensors(tmp_path):
    """PEFT adapts the embedding alone; one tensor here is one in both places."""
    model = gpt2()
    randomized(LoraConfig(r=4, target_modules=["wte"]), model).save_pretrained(tmp_path)
    with pytest.raises(lf.LoraFuncError, match="are one tensor in this model"):
        load(tmp_path, model)


def test_another_embedding(tmp_path):
    """PEFT's file has a copy of the embedding that the adapter was made for."""
    model, _, _ = written("embedding", tmp_path)
    load(tmp_path, model)
    with pytest.raises(lf.LoraFuncError, match="is another one in this model"):
        load(tmp_path, tiny_llama())


def test_needs_no_other_library():
    """Neither PEFT nor transformers."""
    code = "import sys; sys.modules.update(peft=None, transformers=None, huggingface_hub=None)\n"
    code += "from lora_func.interop.peft import load, save"
    subprocess.run([sys.executable, "-c", code], check=True)
