"""Comparison with the features of the original library."""

from collections.abc import Callable

import torch
from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.testing.check import Factory, assert_same

# Backbone and images (1, 3, H, W) uint8 -> features (1, h, w, d), (1, N, d) or (N, d), with the backbone's weights.
Reference = Callable[[Backbone, Tensor], Tensor]


def reference_check(reference: Reference) -> Callable[[Factory], None]:
    """Return a check that compares the features with those of the original library, at two sizes.

    Args:
        reference: Function from a backbone and images (1, 3, H, W) uint8 to features. It copies the weights
            (`backbone.vision_state_dict()`) to the original model and uses the preprocessing of its library.
    """

    @torch.no_grad()
    def equals_its_reference(factory: Factory) -> None:
        backbone = factory()
        side = backbone.window // backbone.patch_size
        hints = ("blocks, projection, or mean and std", "positions, because they are equal at the window")
        for (h, w), hint in zip(((side, side), (side + 2, max(1, side - 1))), hints, strict=True):
            size = (1, 3, h * backbone.patch_size, w * backbone.patch_size)
            images = torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
            expected = reference(backbone, images).reshape(h * w, -1)
            found = backbone(backbone.normalize(images)).flatten(0, 2)
            assert_same(found, expected, f"features of {h} x {w} patches and those of the reference (check {hint})")

    return equals_its_reference
