"""transformers: its transposed linear layer, its configs, and hooks that it registers in a forward.

transformers itself is not imported.
"""

from __future__ import annotations

from typing import Any

from torch import nn

RELIES_ON = {
    "transformers.pytorch_utils": ("Conv1D.__init__(nf, nx)",),
    "transformers.modeling_utils": (
        "PreTrainedModel._can_record_outputs",
        "PreTrainedModel.config_class",
    ),
    "transformers.utils.output_capturing": (
        "source:target_class",
        "source:_output_capturing_hooks_installed",
    ),
    "transformers.configuration_utils": ("PretrainedConfig.get_text_config",),
}


def is_conv1d(module: Any) -> bool:
    """Whether a module is `Conv1D`, GPT-2's linear layer, which holds the transposed matrix."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


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
