"""Several images of different sizes in one sequence, so that a step is not bound by the size of one image.

Linear layers see all tokens at once; attention stays inside each image (`Backbone.run_blocks` with
several grids). The result is that of the images one by one, up to the rounding of matrix products.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Grid = tuple[int, int]


class Network(Protocol):
    """The part of a backbone that a pack goes through; see `backbones.base.Backbone`."""

    patch_size: int
    packs: bool

    def embed(self, images: Tensor) -> Tensor: ...

    def run_blocks(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor: ...

    def project(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor: ...


def dense_features(network: Network, images: Sequence[Tensor]) -> list[Tensor]:
    """Features (h, w, d) of each normalised image (3, H, W), in one pass where the network packs."""
    if not network.packs:
        return [features for image in images for features in _packed(network, [image])]
    return _packed(network, images)


def _packed(network: Network, images: Sequence[Tensor]) -> list[Tensor]:
    grids = [(image.shape[-2] // network.patch_size, image.shape[-1] // network.patch_size) for image in images]
    tokens = torch.cat([network.embed(image[None]) for image in images], dim=1)  # (1, sum of prefix+N_i, D)
    features = network.project(network.run_blocks(tokens, grids), grids)[0]  # (sum of N_i, d)
    maps = features.split([h * w for h, w in grids])
    return [part.unflatten(0, grid) for part, grid in zip(maps, grids, strict=True)]


def per_image(attend: Callable[..., Tensor], tokens: Tensor, lengths: Sequence[int], *each: Sequence[Any]) -> Tensor:
    """Attention of a pack, kept inside each image.

    Args:
        attend: Attention over the tokens (B, n, D) of one image.
        tokens: (B, sum of lengths, D).
        lengths: Tokens of each image, prefix included.
        each: Further arguments of `attend`, one per image.
    """
    parts = [attend(*arguments) for arguments in zip(tokens.split(list(lengths), dim=1), *each, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def patch_tokens(tokens: Tensor, grids: Sequence[Grid], prefix: int) -> Tensor:
    """The tokens without each image's prefix: (B, sum of prefix + N_i, D) -> (B, sum of N_i, D)."""
    if not prefix:
        return tokens
    return torch.cat([part[:, prefix:] for part in tokens.split([prefix + h * w for h, w in grids], dim=1)], dim=1)
