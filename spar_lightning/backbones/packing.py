"""Several images of different sizes in one sequence, so that a step is not bound by the size of one image.

Linear layers see all tokens at once; attention stays inside each image (`Backbone.run_blocks` with
several grids). The result is that of the images one by one, up to the rounding of matrix products. A CPU
gets sequences no longer than its caches bear: there the gain lies in small images alone.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

from spar_lightning.backbones.base import Backbone, Grid

# Above this, four images of a ViT-B in one sequence took 1.17 times as long as one after the other (two cores of
# an AMD EPYC): the C library maps arrays above 32 MiB anew at each use.
CPU_TOKENS: Final = 2048


def dense_features(network: Backbone, images: Sequence[Tensor]) -> list[Tensor]:
    """Features (h, w, d) of each normalised image (3, H, W), in one sequence where the network packs."""
    grids = [(image.shape[-2] // network.patch_size, image.shape[-1] // network.patch_size) for image in images]
    return features_of(network, [network.embed(image[None]) for image in images], grids)


def features_of(network: Backbone, tokens: Sequence[Tensor], grids: Sequence[Grid], start: int = 0) -> list[Tensor]:
    """Features (h, w, d) of images whose tokens are given.

    Args:
        network: Runs its blocks from `start` on, and projects.
        tokens: Of each image, (1, prefix+N, D), as they enter block `start`.
        grids: Patches (h, w) of each image.
        start: First block to run.
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
    """Runs first..last-1 of images of at most `together` images and `most` tokens; a longer image runs alone."""
    cuts = [0]
    for i in range(1, len(lengths)):
        if i - cuts[-1] >= together or sum(lengths[cuts[-1] : i + 1]) > most:
            cuts.append(i)
    return pairwise([*cuts, len(lengths)])


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
