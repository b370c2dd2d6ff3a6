"""What a cache costs before it is built: images, windows, bytes and hours.

Sizes are not guessed: the scan knows every image's height and width, and the augmentation depends on
the key alone, so the result of each image is known. Long lists are sampled evenly.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spar_lightning.datasets.augmentation import Augmentation, SizeError
from spar_lightning.datasets.image_table import Images
from spar_lightning.sliding_window import SlidingWindow

SAMPLED: Final = 2000  # images
IMAGE_SHARE: Final = 0.5  # of the raw bytes of a photograph, lossless; drawings take less
SECONDS: Final = 5.0  # that measuring the rate should take


@dataclass(frozen=True)
class CacheCost:
    """Sums over images; of a sample of them, scaled up.

    Args:
        images: Number of images.
        patches: Patches of all images after augmentation.
        windows: The teacher's windows.
        feature_bytes: Of the stored features.
        image_bytes: Of the stored images, estimated.
    """

    images: int
    patches: float
    windows: float
    feature_bytes: float
    image_bytes: float

    @property
    def bytes(self) -> float:
        """Disk that the shards take."""
        return self.feature_bytes + self.image_bytes

    def of(self, images: int) -> "CacheCost":
        """The same for another number of such images."""
        scale = images / max(self.images, 1)
        return CacheCost(
            images, *(scale * x for x in (self.patches, self.windows, self.feature_bytes, self.image_bytes))
        )


def cost(
    images: Images, augmentation: Augmentation, seed: int, teacher: SlidingWindow, channels: int, itemsize: int
) -> CacheCost:
    """Cost of the features of these images.

    Args:
        images: With their sizes.
        augmentation: Applied to each.
        seed: Of the augmentation.
        teacher: Its window, stride and patch count.
        channels: Of the features.
        itemsize: Bytes of a stored number.
    """
    patch = teacher.backbone.patch_size
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), SAMPLED)).astype(np.int64))
    patches = windows = 0
    for sides in augmented_sizes(images.take(chosen), augmentation, seed).tolist():
        if not all(sides):
            continue
        patches += sides[0] * sides[1] // patch**2
        windows += teacher.count(*sides)
    sampled = CacheCost(
        len(chosen), patches, windows, patches * channels * itemsize, patches * 3 * patch**2 * IMAGE_SHARE
    )
    return sampled.of(len(images))


def augmented_sizes(images: Images, augmentation: Augmentation, seed: int) -> NDArray[np.int64]:
    """Height and width (n, 2) of each image after augmentation, in pixels; 0 where it will be rejected."""
    sizes = np.zeros((len(images), 2), np.int64)
    for i, row in enumerate(images.rows):
        try:
            record = augmentation.draw(int(row["height"]), int(row["width"]), seed, row["key"].decode())
        except SizeError:
            continue
        sizes[i] = record.crop_height, record.crop_width
    return sizes


def windows_per_second(features: Callable[[Tensor], Tensor], teacher: SlidingWindow, device: torch.device) -> float:
    """Windows that the teacher takes in a second, stitching included, measured on images of noise.

    Args:
        features: The teacher's features of an image (3, H, W) uint8.
        teacher: Its window, stride and batch.
        device: Where it lies.
    """
    columns, most = 1, teacher.windows_at_once(device)
    while True:  # wider images until the time is long enough to trust, or a batch is full
        width = teacher.window + (columns - 1) * teacher.stride
        width -= width % teacher.backbone.patch_size
        image = torch.randint(0, 256, (3, teacher.window, width), dtype=torch.uint8)
        count = teacher.count(teacher.window, width)
        features(image)  # the first call of a size chooses kernels
        start = time.perf_counter()
        features(image).sum().item()  # the sum waits for an accelerator
        seconds = time.perf_counter() - start
        if 4 * seconds > SECONDS or count >= most:
            return count / seconds
        columns = min(2 * columns, most + 1)
