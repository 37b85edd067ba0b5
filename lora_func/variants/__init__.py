# ruff: noqa: I001  (the order of the lines is that of every table)
"""The catalogue. A variant of the library is its own file, and one line here."""

from ..variant import Variant
from .lora import LoRA as LoRA
from .pissa import PiSSA as PiSSA
from .milora import MiLoRA as MiLoRA
from .olora import OLoRA as OLoRA
from .corda import CorDA as CorDA
from .loraga import LoRAGA as LoRAGA
from .initab import InitAB as InitAB
from .eva import EVA as EVA
from .loftq import LoftQ as LoftQ
from .adalora import AdaLoRA as AdaLoRA
from .loraxs import LoRAXS as LoRAXS
from .tinylora import TinyLoRA as TinyLoRA
from .gralora import GraLoRA as GraLoRA
from .loha import LoHa as LoHa
from .lokr import LoKr as LoKr
from .abba import ABBA as ABBA
from .hira import HiRA as HiRA
from .miss import MiSS as MiSS
from .dora import DoRA as DoRA
from .delora import DeLoRA as DeLoRA
from .vera import VeRA as VeRA
from .randlora import RandLoRA as RandLoRA
from .vblora import VBLoRA as VBLoRA
from .ia3 import IA3 as IA3
from .ia3ff import IA3FF as IA3FF
from .hra import HRA as HRA
from .ether import ETHER as ETHER
from .etherplus import ETHERPlus as ETHERPlus
from .oft import OFT as OFT
from .boft import BOFT as BOFT
from .road import ROAD as ROAD
from .ssvd import SSVD as SSVD
from .svft import SVFT as SVFT
from .antipasto import AntiPaSTO as AntiPaSTO
from .antipastorotation import AntiPaSTORotation as AntiPaSTORotation
from .antipastocorda import AntiPaSTOCorDA as AntiPaSTOCorDA
from .antipastoablate import AntiPaSTOAblate as AntiPaSTOAblate
from .antipastoarrow import AntiPaSTOArrow as AntiPaSTOArrow
from .antipastodplr import AntiPaSTODPLR as AntiPaSTODPLR
from .ssteer import SSteer as SSteer
from .shira import SHiRA as SHiRA
from .fourierft import FourierFT as FourierFT
from .c3a import C3A as C3A
from .full import Full as Full

VARIANTS: dict[str, type[Variant]] = {
    kind.name(): kind
    for kind in list(vars().values())
    if isinstance(kind, type) and issubclass(kind, Variant) and kind is not Variant
}
"""name -> class."""

__all__ = [kind.__name__ for kind in VARIANTS.values()]  # pyright: ignore
