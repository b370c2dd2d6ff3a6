"""Resizing of a learned absolute positional embedding to the patch grid of an image."""

import torch.nn.functional as F
from torch import Tensor

from spar_lightning.backbones.base import Grid


def resized(table: Tensor, grid: Grid, native: Grid) -> Tensor:
    """Resize a positional embedding (1, native h * native w, D) to a patch grid: (1, h * w, D).

    The interpolation is bicubic without antialiasing, as for SigLIP2 and OpenCLIP in the paper's code. timm
    uses antialiasing, and its result differs by 0.1.
    """
    if grid == native:
        return table
    square = table.transpose(1, 2).unflatten(2, native)
    return F.interpolate(square, grid, mode="bicubic", align_corners=False, antialias=False).flatten(2).transpose(1, 2)
