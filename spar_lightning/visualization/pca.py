"""Features as colours by their three principal components, all panels on one basis (paper, Figures 5 and 7).

The basis is that of the teacher's features of the image: student and teacher share one space, so the same colour
means the same feature in every panel. The paper says neither how features are scaled nor how components become
colours; here they are taken as they are, and a component goes from its 1 % to its 99 % quantile over the teacher.
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
    """Three directions in the space of features, and what range becomes colour.

    Attributes:
        mean: (d).
        components: Unit vectors (d, 3); the largest entry of each is positive, so that signs are always the same.
        low: What becomes 0 (3).
        high: What becomes 1 (3).
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Basis":
        """The basis of features (h, w, d)."""
        rows = features.flatten(0, 1).double()
        mean = rows.mean(0)
        covariance = (rows - mean).T @ (rows - mean)
        components = torch.linalg.eigh(covariance).eigenvectors[:, -3:].flip(1)  # the largest first
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))  # (1, 3)
        components = components * largest.sign()
        shares = torch.tensor([0.01, 0.99], dtype=torch.float64, device=rows.device)
        low, high = ((rows - mean) @ components).quantile(shares, dim=0)
        return cls(mean, components, low, high)

    def colours(self, features: Tensor) -> NDArray[np.float64]:
        """Colours (h, w, 3) from 0 to 1 of features (h, w, d)."""
        places = (features.double() - self.mean) @ self.components
        spread = (self.high - self.low).clamp(min=torch.finfo(torch.float64).tiny)  # a single patch has none
        return np.asarray(((places - self.low) / spread).clamp(0, 1).cpu().numpy())


def draw_pca(image: NDArray[np.uint8], panels: Mapping[str, Tensor], basis: Basis, path: Path) -> None:
    """The image and next to it each panel's features as colours.

    Args:
        image: (H, W, 3).
        panels: Features (h, w, d) by title.
        basis: Of all panels.
        path: Of the picture.
    """
    from matplotlib.figure import Figure

    height, width = image.shape[:2]
    tall = min(max(height / width, 0.2), 3.0)  # panels of very long images keep room for their titles
    figure = Figure(figsize=(4 * (1 + len(panels)), 4 * tall + 0.4))
    axes = figure.subplots(1, 1 + len(panels))
    contents = {"image": image, **{title: basis.colours(features) for title, features in panels.items()}}
    for cell, (title, content) in zip(axes, contents.items(), strict=True):
        cell.imshow(content, extent=(0, width, height, 0), interpolation="nearest")
        cell.set_title(title)
        cell.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
