"""Features with 8 bits per value: each channel of each image has its own range, divided into 255 equal steps.

Ranges of single images need no pass over other images, and are narrower than common ones. A rotation of the channels
(PHI-S, arXiv 2410.01680), which evens out their variance, does not reduce the error further, because the range already
follows each channel (docs/performance.md).
"""

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STEPS: Final = 255
MOST_ERROR: Final = 0.01  # root mean square, relative to the features; a cache with a larger error is not built


def quantized(features: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return codes (h, w, d), and the smallest value and the step (2, d) of each channel, for features (h, w, d)."""
    features = features.float()
    low, high = features.amin((0, 1)), features.amax((0, 1))
    step = (high - low) / STEPS
    codes = ((features - low) / step.where(step > 0, torch.ones_like(step))).round().clamp(0, STEPS)
    return codes.byte().cpu().numpy(), torch.stack([low, step]).cpu().numpy()


def restored(codes: Tensor, ranges: Tensor) -> Tensor:
    """Return features (h, w, d) in fp16 for codes (h, w, d) and ranges (2, d)."""
    low, step = ranges
    return torch.addcmul(low, codes.float(), step).half()


def relative_error(features: Tensor, codes: NDArray[Any], ranges: NDArray[Any]) -> float:
    """Return the root mean square error of the restored features, relative to the features (h, w, d)."""
    kept = restored(torch.from_numpy(codes), torch.from_numpy(ranges)).to(features.device)
    return float((kept - features).norm() / features.norm().clamp(min=1e-30))
