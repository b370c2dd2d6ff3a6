"""Training images and features, augmentation, validation sets, rendered scenes."""

from spar_lightning.datamodules.augmentation import Augmentation
from spar_lightning.datamodules.benchmark import Benchmark
from spar_lightning.datamodules.rendered import RenderedScenes
from spar_lightning.datamodules.sa1b import SA1B

__all__ = ["SA1B", "Augmentation", "Benchmark", "RenderedScenes"]
