"""Backbones, one module per family, all with the interface of `base.Backbone`."""

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.dinov3_text import DINOv3Text
from spar_lightning.backbones.naflex import NaFlex
from spar_lightning.backbones.openclip import OpenCLIP
from spar_lightning.backbones.siglip2 import SigLIP2
from spar_lightning.backbones.tiny import Tiny

__all__ = ["Backbone", "DINOv3Text", "NaFlex", "OpenCLIP", "SigLIP2", "Tiny"]
