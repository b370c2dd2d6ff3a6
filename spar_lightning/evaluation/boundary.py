"""Boundary regions of segmentation maps, for Boundary IoU (Cheng et al., CVPR 2021, section 4).

The boundary region of a class has the pixels of this class that are at most a given distance from its contour. Boundary
IoU is the IoU of the boundary regions of prediction and label map. The distance is the chessboard distance, as in the
published implementation, which erodes masks by squares. A pixel is in the boundary region of its class if a square
around it is not entirely of this class, so one pass finds the regions of all classes.
"""

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

DILATION: Final = 0.02  # distance as a fraction of the image diagonal (published default)


def distance(height: int, width: int) -> int:
    """Return the width of boundary regions in pixels, at least 1."""
    return max(1, round(DILATION * math.hypot(height, width)))


def boundary(labels: Tensor, distance: int) -> Tensor:
    """Return True for each pixel that is at most `distance` from another class or from outside the image.

    The time does not depend on the distance or the number of classes.

    Args:
        labels: Class ids (H, W).
        distance: Chessboard distance in pixels, at least 1; 1 keeps the outermost pixels of each region.
    """
    padded = F.pad(labels.to(torch.int32), (1, 1, 1, 1), value=-1)  # outside the image is another class
    near = _near(padded[1:-1, 1:] != padded[1:-1, :-1], distance)  # (H, W): its row changes near the pixel
    rows = F.pad(near, (0, 0, 1, 1), value=True)  # (H + 2, W)
    # A square is of one class if its middle column is, and each of its rows.
    changes = (padded[1:, 1:-1] != padded[:-1, 1:-1]) | rows[1:] | rows[:-1]  # (H + 1, W)
    return _near(changes.T, distance).T


def _near(changes: Tensor, distance: int) -> Tensor:
    """Return (H, W): whether one of the nearest 2 * distance columns of `changes` (H, W + 1) is True.

    Column x of `changes` is between pixels x - 1 and x.
    """
    counts = F.pad(changes.cumsum(1, dtype=torch.int32), (1, 0))  # (H, W + 2): changes before each column
    x = torch.arange(changes.shape[1] - 1, device=changes.device)
    first, end = (x + 1 - distance).clamp(min=0), (x + 1 + distance).clamp(max=changes.shape[1])
    return counts[:, end] > counts[:, first]
