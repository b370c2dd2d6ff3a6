"""Plain implementation of the published procedure, the baseline of `spar speed`.

Written from the paper (section 3 and supplement) and from what is known of its released code. All windows are cut at
once. The network processes ten windows at a time in fp32. The features of each window are upsampled r times and added
to a canvas, one window after the other. Training uses one image per step, runs the whole network, and freezes
parameters with requires_grad. Nothing is slowed down on purpose.
"""

import math
from collections.abc import Iterable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.backbones.base import Backbone
from spar_lightning.sliding_window import window_starts

WINDOWS: Final = 10  # per forward pass


@torch.no_grad()
def teacher_features(backbone: Backbone, image: Tensor, stride: int) -> Tensor:
    """Return the stitched features (h, w, d) of a normalized image (3, H, W)."""
    patch, window = backbone.patch_size, backbone.window
    height, width = image.shape[-2:]
    k, l = min(window, height), min(window, width)
    places = [(y, x) for y in window_starts(height, window, stride) for x in window_starts(width, window, stride)]
    windows = torch.stack([image[:, y : y + k, x : x + l] for y, x in places])
    maps = torch.cat([backbone(batch).float() for batch in windows.split(WINDOWS)])  # (n, k/P, l/P, d)
    r = patch // math.gcd(patch, stride)
    canvas = maps.new_zeros(maps.shape[-1], height // patch * r, width // patch * r)
    count = canvas.new_zeros(canvas.shape[1:])
    for (y, x), features in zip(places, maps, strict=True):
        fine = F.interpolate(features.permute(2, 0, 1)[None], scale_factor=r, mode="bilinear")[0]
        rows, columns = slice(y * r // patch, (y + k) * r // patch), slice(x * r // patch, (x + l) * r // patch)
        canvas[:, rows, columns] += fine
        count[rows, columns] += 1
    grid = (height // patch, width // patch)
    return F.interpolate((canvas / count)[None], grid, mode="bilinear")[0].permute(1, 2, 0)


class Training:
    """Training with one image per step.

    Args:
        backbone: Student; parameters that require gradients are trained.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
    """

    def __init__(self, backbone: Backbone, lr: float, weight_decay: float) -> None:
        self.backbone = backbone
        self.loss = nn.MSELoss()
        self.optimizer = adamw(backbone.parameters(), lr, weight_decay)

    def step(self, image: Tensor, target: Tensor) -> Tensor:
        """Run one training step and return the loss before the update.

        Args:
            image: Normalized image (3, H, W).
            target: Features of the teacher (h, w, d).
        """
        loss: Tensor = self.loss(self.backbone(image[None])[0].float(), target.float())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW for the parameters that require gradients."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=lr, weight_decay=weight_decay)
