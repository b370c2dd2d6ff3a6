"""Patch features of an image, as probes see them."""

from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from spar_lightning.backbones.base import Backbone
from spar_lightning.errors import UserError
from spar_lightning.image.resize import aligned
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.sliding_window import DenseEncoder, SlidingWindow

Features = Literal["trunk", "dense"]
FEATURES: Final = get_args(Features)


class Trunk(nn.Module):
    """Patch tokens of a backbone after its final norm, without the projection into the text embedding space.

    Args:
        backbone: Backbone that defines `final_norm`.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.norm = backbone, backbone.final_norm()
        self.patch_size, self.window = backbone.patch_size, backbone.window

    def forward(self, images: Tensor) -> Tensor:
        """Return tokens (B, h, w, D) of normalized images (B, 3, H, W)."""
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        tokens = self.norm(self.backbone.trunk_tokens(images))
        patches: Tensor = tokens[:, self.backbone.prefix :].unflatten(1, grid)
        return patches


class PatchEncoder:
    """Encoder of images of any size: uint8 pixels to features of patches.

    Args:
        backbone: Network, on its device.
        config: Single pass or sliding window, and attention; other settings have no effect. Image sides are resized to
            multiples of the patch size (`aligned`), so that patches and labels fit.
        features: `trunk` for the tokens after the final norm, `dense` for the features in the text embedding space.

    Raises:
        UserError: If `features` is neither, or if the backbone does not define `final_norm` for `trunk`.
    """

    def __init__(self, backbone: Backbone, config: InferenceConfig, features: Features = "trunk") -> None:
        if features not in FEATURES:
            raise UserError(f"features must be {' or '.join(FEATURES)}, but got {features!r}.")
        sliding = config.inference == "sliding"
        self.backbone = backbone.with_attention(None if sliding else config.windowed)
        network: DenseEncoder = Trunk(self.backbone) if features == "trunk" else self.backbone
        # Also checks the stride.
        windows = SlidingWindow(network, config.stride, batch_size=config.window_batch, blend=config.blend)
        self._network = windows if sliding else network

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Return fp32 features (h, w, D) of an image (3, H, W) uint8 on the backbone's device."""
        pixels = aligned(self.backbone.normalize(image[None]), self.backbone.patch_size)
        return self._network(pixels)[0].float()

    @property
    def width(self) -> int:
        """Number of channels D of the features."""
        side, device = self.backbone.patch_size, next(self.backbone.parameters()).device
        return self(torch.zeros(3, side, side, dtype=torch.uint8, device=device)).shape[-1]
