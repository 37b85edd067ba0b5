"""PEFT's folders, read and written: PEFT's own model is the oracle.

All parameters are random, because a zero would hide a wrong scale, sign or transpose.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import CASES
from models import text_batch, tiny_llama, trained
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_peft import BlockDiagonal
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import lora_func as lf
from lora_func.interop.peft import load, save
from lora_func.interop.peft.save import exported

TOLERANCE = 1e-5  # float32, relative to the largest entry
LAYERS = ["q_proj", "v_proj", "down_proj"]  # of three shapes; one widens
ON: dict[str, Any] = {"target_modules": LAYERS}
R4: dict[str, Any] = {**ON, "r": 4}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # of PEFT's SHiRA
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # without the model
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # it takes lora_bias for broken
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),  # of PEFT's LN tuning
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys"),  # it uses them
    pytest.mark.filterwarnings("ignore:Specified to not"),  # of VeRA with a seed
]


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Without its kernel, PEFT warns and takes one butterfly factor."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: BlockDiagonal)


def gpt2() -> Any:
    """Its linear layers hold their weights transposed, and its head is tied."""
    sizes = {"n_embd": 24, "n_head": 2, "n_layer": 2, "n_inner": 40, "n_positions": 32}
    config = GPT2Config(vocab_size=64, bos_token_id=1, eos_token_id=2, **sizes)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


def mixtral() -> Any:
    """Experts of matrices [d_out, d_in]."""
    return MixtralForCausalLM(MixtralConfig(**SMALL)).eval()


def gpt_oss() -> Any:
    """Experts of matrices [d_in, d_out], with biases."""
    return GptOssForCausalLM(GptOssConfig(head_dim=8, **SMALL)).eval()


class Convolutions(nn.Module):
    """Of one and of two dimensions."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.point = nn.Conv2d(5, 4, 1)
        self.line = nn.Conv1d(4, 7, 2)
        self.head = nn.Linear(7, 6)

    def forward(self, x):
        x = self.line(self.point(self.wide(x).tanh()).flatten(2)).mT
        return self.head(x.tanh())


def randomized(config: Any, model: nn.Module) -> Any:
    """PEFT's model, with random numbers in all that it trains."""
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return theirs.eval()


def output(model: Any, batch: Any) -> Tensor:
    out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    return out if isinstance(out, Tensor) else out.logits


def assert_close(given: Tensor, reference: Tensor, tolerance: float = TOLERANCE) -> None:
    assert given.shape == reference.shape
    assert (given - reference).abs().max() <= tolerance * reference.abs().max()


def batch_for(model: Any) -> Any:
    return torch.randn(2, 3, 8, 8) if isinstance(model, Convolutions) else text_batch()


Folder = tuple[Callable[[], Any], Any]

# Name -> the model and PEFT's config.
FOLDERS: dict[str, Folder] = {
    "lora": (tiny_llama, partial(LoraConfig, **R4)),
    "lora, all options": (
        tiny_llama,
        partial(
            LoraConfig,
            **R4,
            use_rslora=True,
            lora_alpha=5,
            rank_pattern={"q_proj": 3, "layers.1.mlp.down_proj": 2},
            alpha_pattern={r"layers\.1.*v_proj": 7},
        ),
    ),
    "dora": (tiny_llama, partial(LoraConfig, **R4, use_dora=True)),
    "dora, ranks": (
        tiny_llama,
        partial(LoraConfig, **R4, use_dora=True, rank_pattern={"q_proj": 3}),
    ),
    "orthogonal": (tiny_llama, partial(LoraConfig, **R4, init_lora_weights="orthogonal")),
    "gaussian": (tiny_llama, partial(LoraConfig, **R4, init_lora_weights="gaussian")),
    "pissa": (tiny_llama, partial(LoraConfig, **R4, lora_alpha=3, init_lora_weights="pissa")),
    "olora": (tiny_llama, partial(LoraConfig, **R4, init_lora_weights="olora")),
    "embedding": (tiny_llama, partial(LoraConfig, r=4, target_modules=["embed_tokens", "q_proj"])),
    "modules_to_save": (tiny_llama, partial(LoraConfig, **R4, modules_to_save=["lm_head", "norm"])),
    "tokens": (tiny_llama, partial(LoraConfig, **R4, trainable_token_indices=list(range(5, 40)))),
    "tokens alone": (
        tiny_llama,
        partial(peft.TrainableTokensConfig, token_indices=[3, *range(9, 50)]),
    ),
    "head's tokens": (
        tiny_llama,
        partial(LoraConfig, **R4, trainable_token_indices={"lm_head": [1, 9]}),
    ),
    "regex": (
        tiny_llama,
        partial(LoraConfig, r=4, target_modules=r".*layers\.1\..*(q_proj|up_proj)"),
    ),
    "all-linear": (tiny_llama, partial(LoraConfig, r=4, target_modules="all-linear")),
    "excluded": (
        tiny_llama,
        partial(LoraConfig, r=4, target_modules="all-linear", exclude_modules=r".*layers\.0\..*"),
    ),
    "layers": (
        tiny_llama,
        partial(LoraConfig, **R4, layers_to_transform=[1], layers_pattern="layers"),
    ),
    "one layer": (tiny_llama, partial(LoraConfig, **R4, layers_to_transform=1)),
    "matrix as parameter": (
        tiny_llama,
        partial(LoraConfig, target_modules=[], target_parameters=["q_proj.weight"]),
    ),
    "gpt2": (
        gpt2,
        partial(LoraConfig, r=4, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True),
    ),
    "gpt2, dora": (
        gpt2,
        partial(LoraConfig, r=4, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
    ),
    "gpt2, pissa": (
        gpt2,
        partial(
            LoraConfig, r=4, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights="pissa"
        ),
    ),
    "gpt2, lora_bias": (
        gpt2,
        partial(LoraConfig, r=4, target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True),
    ),
    "gpt2, lora_only": (
        gpt2,
        partial(LoraConfig, r=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only"),
    ),
    "gpt2, all biases": (
        gpt2,
        partial(LoraConfig, r=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="all"),
    ),
    "gpt2, tied head": (
        gpt2,
        partial(
            LoraConfig,
            r=4,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            modules_to_save=["lm_head", "ln_f"],
        ),
    ),
    "convolutions": (
        Convolutions,
        partial(LoraConfig, r=2, target_modules=["wide", "point", "line", "head"]),
    ),
    "experts": (
        mixtral,
        partial(
            LoraConfig, r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"]
        ),
    ),
    "all experts": (
        mixtral,
        partial(
            LoraConfig,
            r=4,
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"experts.down_proj": 3},
        ),
    ),
    "turned experts": (
        gpt_oss,
        partial(
            LoraConfig,
            r=4,
            target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
    ),
    "adalora": (
        tiny_llama,
        partial(peft.AdaLoraConfig, **ON, init_r=5, total_step=9, lora_alpha=3),
    ),
    "tinylora": (tiny_llama, partial(peft.TinyLoraConfig, **ON, u=5)),
    "tinylora, tied": (tiny_llama, partial(peft.TinyLoraConfig, **ON, u=5, weight_tying=1.0)),
    "gralora": (tiny_llama, partial(peft.GraloraConfig, **R4, hybrid_r=2, alpha=5)),
    "hira": (tiny_llama, partial(peft.HiraConfig, **R4, rank_pattern={"q_proj": 2})),
    "loha": (tiny_llama, partial(peft.LoHaConfig, **R4, rank_pattern={"q_proj": 2}, alpha=3)),
    "lokr": (tiny_llama, partial(peft.LoKrConfig, **R4, alpha_pattern={"q_proj": 2})),
    "lokr, both": (
        tiny_llama,
        partial(peft.LoKrConfig, **ON, r=2, decompose_factor=4, decompose_both=True),
    ),
    "miss": (tiny_llama, partial(peft.MissConfig, **ON, r=5)),
    "miss, mini": (tiny_llama, partial(peft.MissConfig, **R4, init_weights="mini", mini_r=4)),
    "delora": (
        tiny_llama,
        partial(peft.DeloraConfig, **R4, rank_pattern={"q_proj": 2}, lambda_pattern={"v_proj": 4}),
    ),
    "shira": (tiny_llama, partial(peft.ShiraConfig, **ON, r=2)),
    "c3a": (
        tiny_llama,
        partial(peft.C3AConfig, **ON, block_size=4, block_size_pattern={"q_proj": 8}),
    ),
    "fourierft": (
        tiny_llama,
        partial(peft.FourierFTConfig, **ON, n_frequency=9, n_frequency_pattern={"q_proj": 7}),
    ),
    "ia3": (
        tiny_llama,
        partial(peft.IA3Config, target_modules=LAYERS, feedforward_modules=["down_proj"]),
    ),
    "hra": (tiny_llama, partial(peft.HRAConfig, **R4)),
    "oft": (
        tiny_llama,
        partial(peft.OFTConfig, **ON, oft_block_size=4, num_cayley_neumann_terms=6),
    ),
    "oft, exact": (
        tiny_llama,
        partial(peft.OFTConfig, **ON, oft_block_size=4, use_cayley_neumann=False, block_share=True),
    ),
    "boft": (tiny_llama, partial(peft.BOFTConfig, **ON, boft_block_size=4)),
    "boft, two": (
        tiny_llama,
        partial(peft.BOFTConfig, **ON, boft_block_size=4, boft_n_butterfly_factor=2),
    ),
    "road": (tiny_llama, partial(peft.RoadConfig, target_modules=LAYERS, group_size=4)),
    "road 4": (tiny_llama, partial(peft.RoadConfig, **ON, group_size=4, variant="road_4")),
    "vera": (tiny_llama, partial(peft.VeraConfig, **R4)),
    "vera, seeded": (
        tiny_llama,
        partial(peft.VeraConfig, **R4, save_projection=False, projection_prng_key=3),
    ),
    "randlora": (tiny_llama, partial(peft.RandLoraConfig, **ON, r=5, randlora_alpha=9)),
    "vblora": (
        tiny_llama,
        partial(peft.VBLoRAConfig, **R4, num_vectors=6, vector_length=4, topk=3),
    ),
    "ln tuning": (
        tiny_llama,
        partial(peft.LNTuningConfig, target_modules=["norm", "input_layernorm"]),
    ),
}
REBASED = ("pissa", "olora", "gpt2, pissa")  # beside a rewritten base, which PEFT makes again
over_folders = pytest.mark.parametrize("name", FOLDERS)


def written(name: str, folder: Path) -> tuple[Any, Any, Any]:
    """A model, PEFT's around it, and a batch; the adapter is in the folder."""
    make, config = FOLDERS[name]
    model = make()
    theirs = randomized(config(), model)
    theirs.save_pretrained(folder)
    return model, theirs, batch_for(model)


@over_folders
def test_load(name, tmp_path):
    model, theirs, batch = written(name, tmp_path)
    adapter, params = load(tmp_path, model)
    expected = output(theirs, batch)
    assert (expected - output(model, batch)).abs().max() > 1e-4 * expected.abs().max()
    assert_close(output(lambda *a, **k: adapter(model, params, batch), batch), expected)


# Of the gradients, these are not PEFT's: its C3A has another than its function in the input, which
# reaches earlier layers. Its BOFT trains two copies of each angle. The folder holds A and B alone.
OTHER_GRADIENTS = ("c3a", "boft", "boft, two", *REBASED)


def by_their_keys(adapter: lf.Adapter, grads: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Gradients under the names of PEFT's parameters.

    What `save` does to parameters is affine: the difference from zeros is what it does to gradients.
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
        return (output(lambda *a, **k: adapter(model, p, batch), batch) * weights).sum()

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
        place, _, rows = key.partition(".token_adapter")
        place = place.removesuffix(".trainable_tokens_delta")
        if place == key:
            assert_close(found[key], after[key], 1e-4)
        else:
            own = found.get(f"{place}.weight", found.get(f"{place}.ln_tuning_layers.weight"))
            assert_close(own[theirs_rows(theirs)], after[key], 1e-4)


# save


@over_folders
def test_there_and_back(name, tmp_path):
    """PEFT's adapter goes through our files and is the same again, with the model and without."""
    model, theirs, batch = written(name, tmp_path / "theirs")
    adapter, params = load(tmp_path / "theirs", model)
    for given in (model, None):
        try:
            save(tmp_path / "ours", adapter, params, model=given)
        except lf.LoraFuncError as error:
            assert ("as_lora" in str(error)) == (name in REBASED)
            assert given is None or name in REBASED
            continue
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        assert_close(output(again, batch), output(theirs, batch))
        other, theirs_ = load(tmp_path / "ours", model)
        assert_close(
            output(lambda *a, **k: other(model, theirs_, batch), batch), output(theirs, batch)
        )


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

    again, theirs_ = load(tmp_path / "new", model)
    assert again.targets == adapter.targets
    assert_close(again(model, theirs_, batch).logits, expected)
    for key, leaf in theirs_.items():
        torch.testing.assert_close(leaf, params[key])
