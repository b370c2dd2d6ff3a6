"""Backbones: one file per family, all behind the contract of `base.Backbone`."""

from spar_lightning.backbones.base import Backbone
from spar_lightning.backbones.tiny import Tiny

__all__ = ["Backbone", "Tiny"]
