"""The table of methods. Each is declared once; a new one is an entry in a file here."""

from __future__ import annotations

from ..method import Method
from .gates import GATES
from .lora import LORA
from .projections import PROJECTIONS
from .updates import UPDATES

METHODS: tuple[Method, ...] = (*LORA, *UPDATES, *GATES, *PROJECTIONS)
TYPES = {method.peft_type for method in METHODS}

ELSEWHERE = {
    "LN_TUNING": "",  # these two train whole tensors, which `whole` reads
    "TRAINABLE_TOKENS": "",
    "BEFT": "it trains biases: lf.Full() on them does",
    "OSF": "it rewrites whole weights: merge it in PEFT and load the merged model",
    "XLORA": "it mixes several LoRAs by a network: load each LoRA by itself",
    "POLY": "it mixes several LoRAs by a router: load each LoRA by itself",
}
"""PEFT's methods that are no variant -> what does the same, or the nearest."""

PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")
PROMPTS += ("ADAPTION_PROMPT", "CARTRIDGE")
