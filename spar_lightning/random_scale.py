"""Random resize of the student's images (multi-resolution distillation; paper, Table 9).

The student sees each image resized by a random factor, and its features are resized to the teacher's patch grid. The
factor depends only on the step and the key of the image, so it is the same on every rank and after a resume.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.errors import UserError
from spar_lightning.files.hashing import hash_bytes


class RandomScale:
    """Random resize of images by a log-uniform factor.

    Args:
        low: Smallest factor.
        high: Largest factor.

    Raises:
        UserError: If the factors are not positive and in this order.
    """

    def __init__(self, low: float, high: float) -> None:
        if not 0 < low <= high < math.inf:
            raise UserError(f"student_scale must be two numbers above 0, the smaller first, but got {low} and {high}.")
        self.low, self.high = low, high
        self.keeps_size = low == high == 1

    def image(self, image: Tensor, patch: int, step: int, key: str) -> Tensor:
        """Resize a normalized image (3, H, W) (bilinear, antialiased) to multiples of the patch size."""
        if self.keeps_size:
            return image
        rng = np.random.default_rng(list(hash_bytes(f"{step}/{key}".encode())))
        factor = self.low * (self.high / self.low) ** rng.uniform()
        size = [max(1, round(side * factor / patch)) * patch for side in image.shape[-2:]]
        return _resized(image, size).to(image.dtype)

    def features(self, features: Tensor, like: Tensor) -> Tensor:
        """Resize features (h, w, d) (bilinear, antialiased) to the patch grid of other features; returns float32."""
        if self.keeps_size:
            return features
        return _resized(features.permute(2, 0, 1), like.shape[:2]).permute(1, 2, 0)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (C, H, W) in float32; antialiasing has no half-precision kernel on CPUs."""
    return F.interpolate(maps[None].float(), tuple(size), mode="bilinear", antialias=True)[0]
