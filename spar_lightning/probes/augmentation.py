"""Augmentation of labeled images for the linear probe: colors, flip, and on request crops of random scale."""

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.datasets.samples import IGNORED, LabelledImage
from spar_lightning.image.resize import resize_labels

BRIGHTNESS, CONTRAST, SATURATION, HUE = 32 / 255, 0.5, 0.5, 18 / 360  # largest change of each
SCALES: Final = (0.5, 2.0)  # of a crop, relative to the image that fits into it
TRIES: Final = 10  # crops that are drawn until one has a labeled pixel


def augmented(image: LabelledImage, crop_size: int | None, rng: np.random.Generator) -> LabelledImage:
    """Return an augmented image: colors changed, mirrored with probability 0.5, and cropped.

    Args:
        image: Labeled image.
        crop_size: Side of a square crop of random scale, padded at the right and bottom if necessary; None keeps the
            size of the image.
        rng: Random generator.
    """
    pixels, labels = jittered(image.image, rng), image.labels
    if crop_size is not None:
        scaled = _scaled(pixels, labels, crop_size, rng)
        for _ in range(TRIES):
            pixels, labels = _cropped(*scaled, crop_size, rng)
            if (labels != IGNORED).any():
                break
    if rng.random() < 0.5:
        pixels, labels = pixels.flip(-1), labels.flip(-1)
    return image._replace(image=pixels.contiguous(), labels=labels.contiguous())


def jittered(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of an image (3, H, W) uint8, each with probability 0.5.

    The contrast is changed before or after saturation and hue, each with probability 0.5 (as in SSD and Mask2Former).
    """
    from torchvision.transforms.v2 import functional as vision  # imported late: it takes seconds

    def contrast(image: Tensor) -> Tensor:
        changed: Tensor = vision.adjust_contrast(image, rng.uniform(1 - CONTRAST, 1 + CONTRAST))
        return changed

    first, *chosen = rng.random(5) < 0.5
    if chosen[0]:
        image = vision.adjust_brightness(image, rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS))
    if chosen[1] and first:
        image = contrast(image)
    if chosen[2]:
        image = vision.adjust_saturation(image, rng.uniform(1 - SATURATION, 1 + SATURATION))
    if chosen[3]:
        image = vision.adjust_hue(image, rng.uniform(-HUE, HUE))
    if chosen[1] and not first:
        image = contrast(image)
    return image


def _scaled(image: Tensor, labels: Tensor, side: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Resize an image and its labels to a random scale, with antialiasing."""
    height, width = labels.shape
    factor = side / max(height, width) * rng.uniform(*SCALES)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    pixels = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return pixels, resize_labels(labels, size)


def _cropped(image: Tensor, labels: Tensor, side: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return a random square crop; an image that is too small is padded with black, unlabeled pixels."""
    missing = [max(0, side - length) for length in labels.shape]
    padding = (0, missing[1], 0, missing[0])
    image, labels = F.pad(image, padding), F.pad(labels, padding, value=IGNORED)
    top, left = (int(rng.integers(length - side + 1)) for length in labels.shape)
    window = slice(top, top + side), slice(left, left + side)
    return image[:, window[0], window[1]], labels[window]


def square_starts(length: int, side: int) -> list[int]:
    """Return the starts of the fewest squares that cover the long side of an image, evenly spread."""
    count = -(-length // side)
    return torch.linspace(0, length - side, count).round().long().tolist()
