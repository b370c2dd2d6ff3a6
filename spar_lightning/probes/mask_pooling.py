"""Pooling of patch features under masks (mask-oracle panoptic segmentation, Table 8 of the paper).

Shapes: H x W pixels, h x w patches, S segments, d channels.
"""

from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.datasets.samples import IGNORED

Pooling = Literal["area", "binary"]
POOLINGS: Final = get_args(Pooling)


def pooled(features: Tensor, ids: Tensor, segments: int, pooling: Pooling) -> Tensor:
    """Return the mean feature (S, d) of each segment.

    Args:
        features: (h, w, d).
        ids: Segment of each pixel (H, W), or `IGNORED`; every segment has at least one pixel.
        segments: Number of segments S.
        pooling: `area` weights a patch by the fraction that the segment covers. `binary` resizes the mask (bilinear)
            and averages the patches above 0, as FC-CLIP does: a small segment can vanish, and its feature is then 0.
    """
    grid, flat = (features.shape[0], features.shape[1]), features.flatten(0, 1)
    means = []
    for index in range(segments):
        mask = (ids == index).to(features)[None, None]
        if pooling == "area":
            weights = F.adaptive_avg_pool2d(mask, grid).flatten()
        else:
            weights = (F.interpolate(mask, grid, mode="bilinear") > 0).flatten().to(features)
        means.append(weights @ flat / weights.sum().clamp(min=torch.finfo(features.dtype).tiny))
    return torch.stack(means) if means else flat[:0]


def areas(ids: Tensor, segments: int) -> Tensor:
    """Return the number of pixels of each segment (S) of `ids` (H, W)."""
    return ids[ids != IGNORED].bincount(minlength=segments)
