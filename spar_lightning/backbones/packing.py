"""Sequence packing: several images of different sizes in one sequence.

Linear layers process all tokens at once; attention stays within each image (`Backbone.attend`).
The features equal those of the images one by one, up to the rounding of matrix products.
On a CPU, the length of a sequence is limited to CPU_TOKENS, so packing is faster only for small images.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from spar_lightning.backbones.base import Backbone, Grid

# In longer sequences, packing four images for a ViT-B took 1.17 times as long as one by one (2 cores of an AMD
# EPYC), because the C library allocates arrays above 32 MiB with mmap at each use.
CPU_TOKENS: Final = 2048


def dense_features(network: Backbone, images: Sequence[Tensor]) -> list[Tensor]:
    """Return the features (h, w, d) of each normalized image (3, H, W), packed if the network supports it."""
    grids = [(image.shape[-2] // network.patch_size, image.shape[-1] // network.patch_size) for image in images]
    return features_of(network, [network.embed(image[None]) for image in images], grids)


def features_of(network: Backbone, tokens: Sequence[Tensor], grids: Sequence[Grid], start: int = 0) -> list[Tensor]:
    """Return the features (h, w, d) of images, computed from their tokens.

    Args:
        network: Backbone that runs the blocks from `start` on and projects the result.
        tokens: Tokens (1, prefix+N, D) of each image at the input of block `start`.
        grids: Patch grid (h, w) of each image.
        start: Index of the first block to run.
    """
    lengths = [part.shape[1] for part in tokens]
    together = len(lengths) if network.packs else 1
    most = CPU_TOKENS if tokens[0].device.type == "cpu" else sum(lengths)
    maps: list[Tensor] = []
    for first, last in _sequences(lengths, together, most):
        ours = grids[first:last]
        pack = torch.cat(list(tokens[first:last]), dim=1)  # (1, sum of prefix+N_i, D)
        features = network.project(network.run_blocks(pack, ours, start), ours)[0]  # (sum of N_i, d)
        parts = features.split([h * w for h, w in ours])
        maps += [part.unflatten(0, grid) for part, grid in zip(parts, ours, strict=True)]
    return maps


def _sequences(lengths: Sequence[int], together: int, most: int) -> Iterator[tuple[int, int]]:
    """Return ranges (first, stop) of at most `together` images and `most` tokens, or of one longer image."""
    cuts = [0]
    for i in range(1, len(lengths)):
        if i - cuts[-1] >= together or sum(lengths[cuts[-1] : i + 1]) > most:
            cuts.append(i)
    return pairwise([*cuts, len(lengths)])


def patch_tokens(tokens: Tensor, grids: Sequence[Grid], prefix: int) -> Tensor:
    """Remove the class and register tokens of each image: (B, sum of prefix+N_i, D) -> (B, sum of N_i, D)."""
    if not prefix:
        return tokens
    return torch.cat([part[:, prefix:] for part in tokens.split([prefix + h * w for h, w in grids], dim=1)], dim=1)
