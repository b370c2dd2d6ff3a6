"""Cost of a feature cache before it is built: images, windows, disk space and throughput.

The shard index records the height and width of every image, and the augmentation depends only on the seed and the
image key. The augmented size of each image is therefore exact. Long lists are sampled evenly.
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
from spar_lightning.feature_cache.extract import Dtype
from spar_lightning.sliding_window import SlidingWindow

SAMPLED: Final = 2000  # images
# Size of a photograph relative to its raw pixels, lossless and as JPEG (int8); drawings need less.
LOSSLESS_SHARE: Final = 0.5
JPEG_SHARE: Final = 0.16
SECONDS: Final = 5.0  # approximate duration of the throughput measurement


@dataclass(frozen=True)
class CacheCost:
    """Total cost of a number of images, extrapolated from a sample of them.

    Args:
        images: Number of images.
        patches: Number of patches of all images after augmentation.
        windows: Number of windows that the teacher processes.
        feature_bytes: Size of the stored features in bytes.
        image_bytes: Estimated size of the stored images in bytes.
    """

    images: int
    patches: float
    windows: float
    feature_bytes: float
    image_bytes: float

    @property
    def bytes(self) -> float:
        """Size of the shards on disk in bytes."""
        return self.feature_bytes + self.image_bytes

    def of(self, images: int) -> "CacheCost":
        """Return the cost scaled to another number of images."""
        scale = images / max(self.images, 1)
        return CacheCost(
            images, *(scale * x for x in (self.patches, self.windows, self.feature_bytes, self.image_bytes))
        )


def cost(
    images: Images, augmentation: Augmentation, seed: int, teacher: SlidingWindow, channels: int, dtype: Dtype
) -> CacheCost:
    """Compute the cost of caching the features of these images.

    Args:
        images: Images with their sizes.
        augmentation: Augmentation of each image.
        seed: Seed of the augmentation.
        teacher: Sliding-window teacher; defines window, stride and patch size.
        channels: Number of feature channels.
        dtype: Precision of the stored features.
    """
    itemsize, share = np.dtype(dtype).itemsize, JPEG_SHARE if dtype == "int8" else LOSSLESS_SHARE
    patch = teacher.backbone.patch_size
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), SAMPLED)).astype(np.int64))
    patches = windows = 0
    for sides in augmented_sizes(images.take(chosen), augmentation, seed).tolist():
        if not all(sides):
            continue
        patches += sides[0] * sides[1] // patch**2
        windows += teacher.count(*sides)
    sampled = CacheCost(len(chosen), patches, windows, patches * channels * itemsize, patches * 3 * patch**2 * share)
    return sampled.of(len(images))


def augmented_sizes(images: Images, augmentation: Augmentation, seed: int) -> NDArray[np.int64]:
    """Return height and width (n, 2) of each image in pixels after augmentation; 0 for images that will be rejected."""
    sizes = np.zeros((len(images), 2), np.int64)
    for i, row in enumerate(images.rows):
        try:
            record = augmentation.draw(int(row["height"]), int(row["width"]), seed, row["key"].decode())
        except SizeError:
            continue
        sizes[i] = record.crop_height, record.crop_width
    return sizes


def windows_per_second(features: Callable[[Tensor], Tensor], teacher: SlidingWindow, device: torch.device) -> float:
    """Measure how many windows the teacher processes per second, including stitching, on random images.

    Args:
        features: Function that computes the teacher's features of an image (3, H, W) uint8.
        teacher: Sliding-window teacher; defines window, stride and batch size.
        device: Device of the teacher.
    """
    columns, most = 1, teacher.windows_at_once(device)
    while True:  # widen the image until the measured time is long enough or a batch is full
        width = teacher.window + (columns - 1) * teacher.stride
        width -= width % teacher.backbone.patch_size
        image = torch.randint(0, 256, (3, teacher.window, width), dtype=torch.uint8)
        count = teacher.count(teacher.window, width)
        features(image)  # warm-up: the first call with a new size selects kernels
        start = time.perf_counter()
        features(image).sum().item()  # item() waits for the accelerator
        seconds = time.perf_counter() - start
        if 4 * seconds > SECONDS or count >= most:
            return count / seconds
        columns = min(2 * columns, most + 1)
