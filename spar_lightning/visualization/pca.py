"""Features as colors by their first three principal components, with one basis for all panels (paper, Figures 5 and 7).

The basis is computed from the teacher's features of the image. Student and teacher share one feature space, so the
same color means the same feature in every panel. The paper does not say how features are scaled or how components are
mapped to colors. Here, features are not scaled, and the color range of a component is the range from its 1 % to its
99 % quantile over the teacher's features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """Three directions in feature space, and the ranges that are mapped to colors.

    Attributes:
        mean: Mean feature (d).
        components: Unit vectors (d, 3); the largest entry of each is positive, so that signs are reproducible.
        low: Value of each component that is mapped to 0 (3).
        high: Value of each component that is mapped to 1 (3).
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Basis":
        """Compute the basis of features (h, w, d)."""
        rows = features.flatten(0, 1).double()
        mean = rows.mean(0)
        covariance = (rows - mean).T @ (rows - mean)
        components = torch.linalg.eigh(covariance).eigenvectors[:, -3:].flip(1)  # largest first
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))  # (1, 3)
        components = components * largest.sign()
        shares = torch.tensor([0.01, 0.99], dtype=torch.float64, device=rows.device)
        low, high = ((rows - mean) @ components).quantile(shares, dim=0)
        return cls(mean, components, low, high)

    def colours(self, features: Tensor) -> NDArray[np.float64]:
        """Map features (h, w, d) to RGB colors (h, w, 3) from 0 to 1."""
        places = (features.double() - self.mean) @ self.components
        spread = (self.high - self.low).clamp(min=torch.finfo(torch.float64).tiny)  # zero for a single patch
        return np.asarray(((places - self.low) / spread).clamp(0, 1).cpu().numpy())


def draw_pca(image: NDArray[np.uint8], panels: Mapping[str, Tensor], basis: Basis, path: Path) -> None:
    """Draw the image and, next to it, the features of each panel as colors.

    Args:
        image: RGB image (H, W, 3).
        panels: Features (h, w, d) by panel title.
        basis: Basis for all panels.
        path: Image file to write.
    """
    from matplotlib.figure import Figure

    height, width = image.shape[:2]
    tall = min(max(height / width, 0.2), 3.0)  # limited, so that titles fit next to very long images
    figure = Figure(figsize=(4 * (1 + len(panels)), 4 * tall + 0.4))
    axes = figure.subplots(1, 1 + len(panels))
    contents = {"image": image, **{title: basis.colours(features) for title, features in panels.items()}}
    for cell, (title, content) in zip(axes, contents.items(), strict=True):
        cell.imshow(content, extent=(0, width, height, 0), interpolation="nearest")
        cell.set_title(title)
        cell.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
