"""Image resizing: mmcv's keep-ratio resize, and rules for sides that are not multiples of the patch size.

The option `patch_fit` selects how image sides are made multiples of the patch size:

- `aligned` resizes to the nearest multiples, so that the patch grid covers the image exactly.
- `paper` reproduces the published code of each backbone family (attribute `paper_patch_fit` of the backbone). Its
  results are misaligned by up to one patch at the right and lower borders, because the patch grid is then mapped to
  the image as if it fitted exactly.
"""

import math
from collections.abc import Callable, Iterable
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.errors import UserError

Rule = Callable[[Tensor, int], Tensor]  # images (B, 3, H, W), patch size P -> images with sides divisible by P
PatchFit = Literal["aligned", "paper"]
BAND: Final = 2**22  # pixels that are resized at once
Resize = tuple[int, int] | int | None  # bounds of long and short side, or side of a square of equal area


def check_sides(images: Tensor, patch_size: int) -> None:
    """Raise UserError unless both sides of images (B, 3, H, W) are positive multiples of the patch size."""
    height, width = images.shape[-2:]
    if not height or not width or height % patch_size or width % patch_size:
        raise UserError(
            f"Image sides must be multiples of the patch size {patch_size}, but got {height} x {width}. "
            "Resize the image first, or use Segmenter, which resizes images itself."
        )


def rescaled(height: int, width: int, bounds: tuple[int, int]) -> tuple[int, int]:
    """Return the largest size of the same aspect ratio with both sides within the bounds (rule of mmcv)."""
    factor = min(max(bounds) / max(height, width), min(bounds) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def of_area(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """Return a size of similar aspect ratio with area `side` x `side`, in multiples of `multiple` (paper, Figure 3)."""
    factor = side / math.sqrt(height * width)
    return max(1, round(height * factor / multiple)) * multiple, max(1, round(width * factor / multiple)) * multiple


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image (3, H, W) uint8 like OpenCV's INTER_LINEAR: bilinear, no antialiasing, rounded."""
    if size == tuple(image.shape[-2:]):
        return image
    pixels = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]
    return pixels.round().clamp(0, 255).to(torch.uint8)


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a label map (H, W): each pixel of the result gets the label at its center."""
    centers = [
        ((torch.arange(target, dtype=torch.float64, device=labels.device) + 0.5) * source / target).long()
        for source, target in zip(labels.shape, size, strict=True)
    ]
    return labels[centers[0][:, None], centers[1]]


def at_most(image: Tensor, side: int) -> Tensor:
    """Limit the long side of an image (3, H, W) uint8 to `side` pixels: shrink with antialiasing, never enlarge."""
    if max(image.shape[-2:]) <= side:
        return image
    bands = image.cpu().split(max(1, BAND // image.shape[-1]), dim=1)  # uint8 cannot be shrunk on GPUs
    return bands_at_most(bands, (image.shape[-2], image.shape[-1]), side).to(image.device)


def bands_at_most(bands: Iterable[Tensor], size: tuple[int, int], side: int) -> Tensor:
    """Shrink an image that comes in bands of rows (3, n, W) uint8, like `at_most`.

    The columns of each band are shrunk first, so that little memory is needed beyond the bands.
    """
    rows, columns = rescaled(*size, (side, side))
    narrow = torch.empty(3, size[0], columns, dtype=torch.uint8)
    top = 0
    for band in bands:
        narrow[:, top : top + band.shape[1]] = _shrunk(band, (band.shape[1], columns))
        top += band.shape[1]
    return _shrunk(narrow, (rows, columns))


def _shrunk(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Shrink an image (3, H, W) uint8 with antialiasing (bilinear)."""
    return F.interpolate(image[None].contiguous(), size, mode="bilinear", antialias=True)[0]


def aligned(images: Tensor, patch: int) -> Tensor:
    """Resize (bilinear) both sides to the nearest multiples of the patch size."""
    return _resized(images, list(aligned_size(images.shape[-2], images.shape[-1], patch)), "bilinear")


def aligned_size(height: int, width: int, patch: int) -> tuple[int, int]:
    """Return the nearest multiples of the patch size, at least one patch."""
    return max(1, round(height / patch)) * patch, max(1, round(width / patch)) * patch


def pad(images: Tensor, patch: int) -> Tensor:
    """Pad with zeros at the right and bottom to the next multiples, as in the published SigLIP2 code."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % patch, 0, -height % patch))


def drop(images: Tensor, patch: int) -> Tensor:
    """Crop to the previous multiples, as in the published OpenCLIP code; sides below one patch are stretched."""
    height, width = (side // patch * patch for side in images.shape[-2:])
    return images[..., :height, :width] if height and width else stretch(images, patch)


def stretch(images: Tensor, patch: int) -> Tensor:
    """Resize (bicubic) to the next multiples, as in the published DINOv3.txt code."""
    return _resized(images, [-(-side // patch) * patch for side in images.shape[-2:]], "bicubic")


def _resized(images: Tensor, size: list[int], mode: str) -> Tensor:
    if size == list(images.shape[-2:]):
        return images
    return F.interpolate(images, size, mode=mode, align_corners=False)
