"""Backbones, one module per family, all with the interface of `base.Backbone`."""

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.c_radio import CRADIO
from spar_lightning.backbones.dinov3_text import DINOv3Text
from spar_lightning.backbones.eva02_clip import EVA02CLIP
from spar_lightning.backbones.naflex import NaFlex
from spar_lightning.backbones.openclip import OpenCLIP
from spar_lightning.backbones.pe_core import PECore
from spar_lightning.backbones.siglip2 import SigLIP2
from spar_lightning.backbones.tiny import Tiny
from spar_lightning.backbones.tips_v2 import TIPSv2

__all__ = [
    "CRADIO",
    "EVA02CLIP",
    "Backbone",
    "DINOv3Text",
    "NaFlex",
    "OpenCLIP",
    "PECore",
    "SigLIP2",
    "TIPSv2",
    "Tiny",
]  # fmt: skip
