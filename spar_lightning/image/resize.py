"""Sizes of images: mmcv's keep-ratio resize, and sides that are no multiples of the patch.

One rule for all backbones decides what becomes of such sides.

`aligned` resizes to the nearest multiples, so that the patch grid covers the image exactly. `paper`
reproduces what the published code does per family (a backbone names it in `paper_patch_fit`); the maps
it gives are off by up to a patch at the right and lower border, because the grid is then laid over the
image as if it fitted.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.errors import UserError

Rule = Callable[[Tensor, int], Tensor]  # images (B, 3, H, W) and the patch P -> images with sides that P divides
PatchFit = Literal["aligned", "paper"]
Resize = tuple[int, int] | int | None  # bounds of the long and the short side, or the side of a square of that area


def check_sides(images: Tensor, patch_size: int) -> None:
    """Raise UserError unless both sides of images (B, 3, H, W) are positive multiples of the patch size."""
    height, width = images.shape[-2:]
    if not height or not width or height % patch_size or width % patch_size:
        raise UserError(
            f"Images must have sides that are multiples of the patch size {patch_size}, but got "
            f"{height} x {width}. Resize the image first; Segmenter does it for you."
        )


def rescaled(height: int, width: int, bounds: tuple[int, int]) -> tuple[int, int]:
    """Largest size with the same aspect whose long and short side stay within the bounds (mmcv's rule)."""
    factor = min(max(bounds) / max(height, width), min(bounds) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def of_area(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """Size with nearly the same aspect and the area of a square, both sides multiples of a number (paper, Figure 3)."""
    factor = side / math.sqrt(height * width)
    return max(1, round(height * factor / multiple)) * multiple, max(1, round(width * factor / multiple)) * multiple


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Image (3, H, W) uint8 at another size: bilinear without antialias, rounded, as OpenCV's INTER_LINEAR."""
    if size == tuple(image.shape[-2:]):
        return image
    pixels = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]
    return pixels.round().clamp(0, 255).to(torch.uint8)


def at_most(image: Tensor, side: int) -> Tensor:
    """Image (3, H, W) uint8 whose long side has at most this many pixels: shrunk with antialias, never enlarged."""
    height, width = image.shape[-2:]
    if max(height, width) <= side:
        return image
    size = rescaled(height, width, (side, side))
    pixels = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return pixels.round().clamp(0, 255).to(torch.uint8)


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
