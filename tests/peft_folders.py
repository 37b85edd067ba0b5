"""Folders that PEFT writes, of every method that both libraries have.

All parameters are random, because a zero would hide a wrong scale, sign or transpose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import text_batch, tiny_llama
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

TOLERANCE = 1e-5  # float32, relative to the largest entry
LAYERS = ["q_proj", "v_proj", "down_proj"]  # of three shapes; one widens
ON: dict[str, Any] = {"target_modules": LAYERS}
R4: dict[str, Any] = {**ON, "r": 4}


def gpt2() -> Any:
    """Its linear layers hold their weights transposed, and its head is tied."""
    sizes: dict[str, Any] = {
        "n_embd": 24,
        "n_head": 2,
        "n_layer": 2,
        "n_inner": 40,
        "n_positions": 32,
    }
    config = GPT2Config(vocab_size=64, bos_token_id=1, eos_token_id=2, **sizes)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


SMALL: dict[str, Any] = {
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
    """The logits of a model."""
    return logits(model(**batch) if isinstance(batch, Mapping) else model(batch))


def logits(out: Any) -> Tensor:
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
    "tied tokens": (
        gpt2,
        partial(
            LoraConfig,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            trainable_token_indices=list(range(4, 40)),
        ),
    ),
    "tied modules": (
        partial(tiny_llama, tie_word_embeddings=True),
        partial(LoraConfig, **R4, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
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


QUIET = [
    pytest.mark.filterwarnings(message)
    for message in (
        "ignore:Sparse invariant checks:UserWarning",  # of PEFT's SHiRA
        "ignore:`lora_bias=True` was passed",
        "ignore:fan_in_fan_out is set to False",  # without the model
        "ignore:Adapter 'default'",  # it takes lora_bias for broken
        "ignore:Setting `save_embedding_layers`",
        "ignore:`is_gradient_checkpointing` is deprecated",
        "ignore:Model has `tie_word_embeddings=True`",
        "ignore:Unsupported layer type",  # of PEFT's LN tuning
        "ignore:The following rank_pattern keys",  # it uses them
        "ignore:Specified to not",  # of VeRA with a seed
    )
]
"""Of PEFT's warnings, those about what these folders are meant to be."""


class BlockDiagonal:
    """PEFT's kernel for BOFT, [N, D, H, H] -> [N, D H, D H], which it compiles for a GPU."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*own) for own in blocks])]

    @staticmethod
    def backward(grad, blocks):
        rows = grad.unflatten(1, blocks.shape[1:3]).unflatten(3, blocks.shape[1:3])
        return [rows.diagonal(dim1=1, dim2=3).movedim(-1, 1)]


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Without its kernel, PEFT warns and takes one butterfly factor."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: BlockDiagonal)
