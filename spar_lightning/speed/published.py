"""The published procedure, plainly: what the ratios of `spar speed` compare with.

Written from the paper (section 3 and supplement) and from what is known of its released code. All windows are
cut at once, the network sees ten at a time in fp32, every window's features are upsampled r times and
added to a canvas one window after the other. Training sees one image per step, runs the whole network, and
freezes by requires_grad. Nothing here is slowed down on purpose.
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
    """Stitched features (h, w, d) of a normalised image (3, H, W)."""
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
    """Steps on one image each.

    Args:
        backbone: Its trainable parameters are those that require gradients.
        lr: Learning rate.
        weight_decay: Weight decay.
    """

    def __init__(self, backbone: Backbone, lr: float, weight_decay: float) -> None:
        self.backbone = backbone
        self.loss = nn.MSELoss()
        self.optimizer = adamw(backbone.parameters(), lr, weight_decay)

    def step(self, image: Tensor, target: Tensor) -> Tensor:
        """The loss of a normalised image (3, H, W) with the teacher's features (h, w, d), before the update."""
        loss: Tensor = self.loss(self.backbone(image[None])[0].float(), target.float())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over those of the parameters that train."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=lr, weight_decay=weight_decay)
