"""Training images of the linear probe: an endless sequence, the same for any number of ranks and restarts."""

from functools import lru_cache

import numpy as np
from torch.utils.data import Dataset

from spar_lightning.datasets.samples import LabelledImage
from spar_lightning.probes.augmentation import augmented


class TrainingImages(Dataset[LabelledImage]):
    """Augmented images by their position in training: every pass over the images has an order of its own.

    Args:
        images: Labeled images.
        count: Number of images.
        crop_size: Side of random crops in pixels; None keeps the size of each image.
        seed: Seed of order and augmentation.
    """

    def __init__(self, images: Dataset[LabelledImage], count: int, crop_size: int | None, seed: int) -> None:
        self._images, self._count, self._crop_size, self._seed = images, count, crop_size, seed

    def __getitem__(self, position: int) -> LabelledImage:
        epoch, place = divmod(position, self._count)
        index = int(_order(self._seed, epoch, self._count)[place])
        return augmented(self._images[index], self._crop_size, np.random.default_rng([self._seed, 1, position]))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)
