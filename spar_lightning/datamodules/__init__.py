"""Data modules: training images and features, augmentation, validation sets, synthetic images."""

from spar_lightning.datamodules.rendered_scenes import RenderedScenes
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.datasets.augmentation import Augmentation

__all__ = ["SA1B", "Augmentation", "RenderedScenes"]
