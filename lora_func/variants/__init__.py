"""The catalogue: name -> class. A new variant is its own file and one line here."""

from .delora import DeLoRA
from .dora import DoRA
from .hra import HRA
from .ia3 import IA3
from .ia3ff import IA3FF
from .lora import LoRA
from .pissa import PiSSA

VARIANTS = {variant.name(): variant for variant in (LoRA, PiSSA, DoRA, DeLoRA, IA3, IA3FF, HRA)}
