"""The catalogue: name -> class. A new variant is its own file and one line here."""

from .antipasto import AntiPaSTO
from .antipastoablate import AntiPaSTOAblate
from .antipastoarrow import AntiPaSTOArrow
from .antipastocorda import AntiPaSTOCorDA
from .antipastorotation import AntiPaSTORotation
from .corda import CorDA
from .delora import DeLoRA
from .dora import DoRA
from .eva import EVA
from .hra import HRA
from .ia3 import IA3
from .ia3ff import IA3FF
from .lora import LoRA
from .loraga import LoRAGA
from .milora import MiLoRA
from .olora import OLoRA
from .pissa import PiSSA
from .ssteer import SSteer
from .ssvd import SSVD

ALL = (
    *(LoRA, PiSSA, MiLoRA, OLoRA, CorDA, LoRAGA, EVA, DoRA, DeLoRA, IA3, IA3FF, HRA, SSVD),
    *(AntiPaSTO, AntiPaSTORotation, AntiPaSTOCorDA, AntiPaSTOAblate, AntiPaSTOArrow, SSteer),
)
VARIANTS = {variant.name(): variant for variant in ALL}
