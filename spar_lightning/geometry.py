"""What becomes of an image whose sides are no multiples of the patch: one rule for all backbones.

`aligned` resizes to the nearest multiples, so that the patch grid covers the image exactly. `paper`
reproduces what the published code does per family (a backbone names it in `paper_geometry`); the maps
it gives are off by up to a patch at the right and lower border, because the grid is then laid over the
image as if it fitted.
"""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Rule = Callable[[Tensor, int], Tensor]  # images (B, 3, H, W) and the patch P -> images with sides that P divides
Geometry = Literal["aligned", "paper"]


def aligned(images: Tensor, patch: int) -> Tensor:
    """Resize (bilinear) to the nearest multiples."""
    return _resized(images, [max(1, round(side / patch)) * patch for side in images.shape[-2:]], "bilinear")


def pad(images: Tensor, patch: int) -> Tensor:
    """Zeros right and below, up to the next multiples: the published SigLIP2 code."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % patch, 0, -height % patch))


def drop(images: Tensor, patch: int) -> Tensor:
    """Leave out what is over: the published OpenCLIP code. A side below one patch is stretched to it."""
    height, width = (side // patch * patch for side in images.shape[-2:])
    return images[..., :height, :width] if height and width else stretch(images, patch)


def stretch(images: Tensor, patch: int) -> Tensor:
    """Resize (bicubic) to the next multiples: the published DINOv3.txt code."""
    return _resized(images, [-(-side // patch) * patch for side in images.shape[-2:]], "bicubic")


def _resized(images: Tensor, size: list[int], mode: str) -> Tensor:
    if size == list(images.shape[-2:]):
        return images
    return F.interpolate(images, size, mode=mode, align_corners=False)
