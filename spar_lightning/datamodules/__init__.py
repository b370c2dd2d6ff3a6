"""Training images and features, augmentation, validation sets, rendered scenes."""

from spar_lightning.datamodules.rendered_scenes import RenderedScenes
from spar_lightning.datamodules.sa1b import SA1B
from spar_lightning.datasets.augmentation import Augmentation

__all__ = ["SA1B", "Augmentation", "RenderedScenes"]
