"""PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`. PEFT itself is not needed.

`load` reads a folder that PEFT wrote; `save` writes one that PEFT reads, and with it the tools that
take PEFT's format. `methods` says for each method how the two name and lay out its numbers.
"""

from .load import load
from .save import save

__all__ = ["load", "save"]
