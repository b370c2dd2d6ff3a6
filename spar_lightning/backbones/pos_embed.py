"""A learned table of absolute positions, resized to the patch grid of an image."""

import torch.nn.functional as F
from torch import Tensor

from spar_lightning.backbones.base import Grid


def resized(table: Tensor, grid: Grid, native: Grid) -> Tensor:
    """Positions (1, N, D) of a grid, from a table (1, native h * native w, D).

    Bicubic without antialias, as SigLIP2 and OpenCLIP are resized in the paper's code; timm's own
    resampling antialiases and differs by 0.1.
    """
    if grid == native:
        return table
    square = table.transpose(1, 2).unflatten(2, native)
    return F.interpolate(square, grid, mode="bicubic", align_corners=False, antialias=False).flatten(2).transpose(1, 2)
