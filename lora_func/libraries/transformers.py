"""transformers: its transposed linear layer, its configs, and hooks that it registers in a forward.

transformers itself is not imported.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

RELIES_ON = {
    "transformers.pytorch_utils": ("Conv1D.__init__(nf, nx)",),
    "transformers.modeling_utils": (
        "PreTrainedModel._can_record_outputs",
        "PreTrainedModel.config_class",
        "source:transformers_weights",
    ),
    "transformers.utils.output_capturing": (
        "source:target_class",
        "source:_output_capturing_hooks_installed",
    ),
    "transformers.configuration_utils": ("PretrainedConfig.get_text_config", "PreTrainedConfig"),
    "transformers.generation": (
        "GenerationConfig",
        "GenerationMixin.generate",
        "GenerationMixin._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids)",
    ),
    "transformers.generation.utils": ("source:self._expand_inputs_for_generation(",),
    "transformers.integrations.moe": (
        "use_experts_implementation(is_transposed)",
        "source:self.is_transposed = is_transposed",
        "source:torch.ops.transformers.grouped_mm_fallback(input",
    ),
    "torch": ("_grouped_mm",),
    "transformers.trainer_utils": ("source:_hf_peft_config_loaded",),
    "transformers.utils": ("CONFIG_NAME", "SAFE_WEIGHTS_NAME"),
}

EXPAND = "_expand_inputs_for_generation"  # generate's method that repeats prompts for beams
WEIGHTS = "model.safetensors"  # the file in which its Trainer looks for a checkpoint's weights
CONFIG = "config.json"
NO_MODEL = "this folder holds an adapter of lora_func, which lora_func.load reads, and no model"


def holds_model(folder: Path) -> bool:
    """Whether `from_pretrained` reads a model from a folder."""
    config = folder / CONFIG
    return config.exists() and NO_MODEL not in config.read_text(encoding="utf-8")


def mark_adapter(folder: Path, view: Any) -> None:
    """Makes `from_pretrained` raise in a folder that holds an adapter alone.

    It would leave the model of its config at random values, with a warning. The config that this
    writes names a file of weights that cannot be, and the error shows the name. A call with a
    config of its own, `from_pretrained(folder, config=..)`, does not read it.
    """
    config = {"transformers_weights": NO_MODEL}
    if isinstance(kind := getattr(getattr(view, "config", None), "model_type", None), str):
        config["model_type"] = kind
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def own_configs(view: nn.Module) -> None:
    """Gives a bound view configs of its own, because trainers and users set fields of them."""
    memo: dict[int, Any] = {}  # a config holds those of its parts
    for module in view.modules():
        for name, value in module.__dict__.items():
            kinds = {kind.__name__ for kind in type(value).__mro__}
            if not kinds.isdisjoint(("PreTrainedConfig", "GenerationConfig")):
                module.__dict__[name] = copy.deepcopy(value, memo)


def allow_training(view: nn.Module) -> None:
    """Lets Trainer train a bound view of a quantized model, which it refuses without an adapter."""
    if getattr(view, "is_quantized", False):
        view.__dict__["_hf_peft_config_loaded"] = True


def is_conv1d(module: Any) -> bool:
    """Whether a module is `Conv1D`, GPT-2's linear layer, which holds the transposed matrix."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


# Outside of its registry of experts: the stacks that a class uses as `x @ W`.
TRANSPOSED = {
    "Llama4TextExperts": ("gate_up_proj", "down_proj"),
    "AriaGroupedExpertsGemm": ("weight",),  # before 5.18
    "GroupedLinearLayer": ("weight",),  # ConvBERT
    "CsmCodebooksHead": ("weight",),
    "RecurrentGemmaRglru": ("input_gate_weight", "recurrent_gate_weight"),
    "EsmFold2ConfidenceHead": ("plddt_weight", "resolved_weight"),
}


def holds_transposed(module: Any, name: str) -> bool:
    """Whether a module holds its stack of matrices `name` as `[E, d_in, d_out]`.

    Experts of the registry say so themselves, for all of their stacks.
    """
    kinds = [kind.__name__ for kind in type(module).__mro__]
    listed = any(name in TRANSPOSED.get(kind, ()) for kind in kinds)
    return listed or bool(getattr(module, "is_transposed", False))


class Routing(NamedTuple):
    """How a module of experts is told which token goes to which expert."""

    arguments: tuple[str, ...]  # of its forward; the first is the tokens [T, d]
    ids: str | None  # the one with the experts of each token [T, k]; None: tokens come expert first
    counts: tuple[str, ...]  # its attributes that count experts; ids are below the first


# Ernie 4.5 VL sorts tokens by their kind before it calls its experts.
REORDERED = frozenset({"Ernie4_5_VLMoeMoeExperts"})


def routing(experts: nn.Module) -> Routing | None:
    """How a module of experts is called, or None if it is not known, or called in another way."""
    if type(experts).__name__ in REORDERED:
        return None
    arguments = tuple(inspect.signature(type(experts).forward).parameters)[1:]
    names = ("num_experts", "total_experts", "num_routed_experts")
    counts = tuple(name for name in names if name in vars(experts))
    if counts and type(experts).__name__ == "Llama4TextExperts":
        return Routing(arguments, None, counts)
    if counts and arguments[1:2] in (("top_k_index",), ("router_indices",)):
        return Routing(arguments, arguments[1], counts)
    return None


def multiplies_groups(function: Any) -> bool:
    """Whether a function multiplies sorted rows with a stack, one matrix for each group of `offs`.

    It is torch's own, or the one that transformers falls back to.
    """
    fallback = str(function).startswith("transformers.grouped_mm_fallback")
    return fallback or function is torch._grouped_mm  # pyright: ignore  (private)


def hidden_size(model: nn.Module) -> int | None:
    """The width of a text model, as its config says."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has two streams of tokens, as its config says."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def records_outputs(module: nn.Module) -> bool:
    """Whether `recorded_classes` applies to a module."""
    return hasattr(type(module), "_can_record_outputs")


def recorded_classes(model: Any) -> tuple[type, ...]:
    """The classes of modules on which the model is about to register hooks that record outputs.

    It does so in the middle of the first forward that asks for hidden states or attentions, once
    for each model and on the modules that it finds. A view that shared such a module with the
    model would leave a hook on it at every call. An entry that is a name may mean any module.
    """
    if model.__dict__.get("_output_capturing_hooks_installed"):
        return ()
    specs = []
    for spec in (model._can_record_outputs or {}).values():
        specs += spec if isinstance(spec, list) else [spec]
    classes = [getattr(spec, "target_class", spec) for spec in specs]
    return tuple(kind if isinstance(kind, type) else nn.Module for kind in classes)
