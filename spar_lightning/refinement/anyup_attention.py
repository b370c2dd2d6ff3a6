"""Attention from pixels to nearby patches in bands of rows: exact, and without a mask of all pixels times all patches.

A pixel sees the patches within a tenth of the image's height and width. Pixels of adjacent rows usually see the same
rows of patches. Such rows form a band, which is split into tiles of some columns. The keys of a tile are cut out of
the grid, so only the columns need a mask.

Shapes: C maps, H x W pixels, h x w patches, 128 channels in 4 heads.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.refinement.base import BAND

HEADS: Final = 4
REACH: Final = 0.1  # fraction of the image side, in each direction
TILE: Final = 8  # columns of patches; wider tiles are fewer, but mask more of their keys


class WindowAttention(nn.Module):
    """Last stage of AnyUp, with module names as in the official weights (two of these weights are unused).

    Args:
        width: Number of channels of queries and keys.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cross_attn = Projections(width)
        self.conv2d = nn.Conv2d(width, width, 3, padding=1, bias=False)

    @torch.no_grad()
    def rows(self, queries: Tensor, keys: Tensor, values: Tensor) -> Iterator[Tensor]:
        """Yield weighted averages (C, n, W) of the values, n rows of pixels at a time, from top to bottom.

        Args:
            queries: Queries of all pixels (128, H, W).
            keys: Keys of all patches (128, h, w).
            values: Maps to upsample (C, h, w), with any C.
        """
        (height, width), (h, w) = queries.shape[1:], keys.shape[1:]
        keys = self.cross_attn.keys(keys)  # (heads, h, w, channels)
        tops, bottoms = reach(height, h)
        tiles = [tile.to(keys.device) for tile in columns(width, w)]
        seen_at_once = int((bottoms - tops).max()) * max(tile.hidden.numel() for tile in tiles)
        most = max(1, BAND // max(HEADS * seen_at_once, len(values) * width))
        for start, stop in runs(tops, bottoms, most):
            band = self.cross_attn.queries(self._smoothed(queries, start, stop))  # (heads, n, W, channels)
            seen = slice(int(tops[start]), int(bottoms[start]))
            result = values.new_empty(len(values), stop - start, width)
            for tile in tiles:
                weights = attention(band[:, :, tile.pixels], keys[:, seen, tile.patches], tile.hidden)
                with torch.autocast(values.device.type, enabled=False):  # bf16 cannot separate close classes
                    average = values[:, seen, tile.patches].flatten(1) @ weights.to(values.dtype).T
                result[:, :, tile.pixels] = average.unflatten(1, (stop - start, -1))
            yield result

    def _smoothed(self, queries: Tensor, start: int, stop: int) -> Tensor:
        """Return rows start..stop-1 after the 3 x 3 convolution with zero padding: (128, n, W)."""
        above, below = int(start > 0), int(stop < queries.shape[1])
        padded = F.pad(queries[None, :, start - above : stop + below], (1, 1, 1 - above, 1 - below))
        return F.conv2d(padded, self.conv2d.weight)[0].to(queries.dtype)


class Projections(nn.Module):
    """Norms and projections of queries and keys.

    Args:
        width: Number of channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_q = nn.RMSNorm(width)
        self.norm_k = nn.RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, HEADS)  # stores the weights, never called

    def queries(self, x: Tensor) -> Tensor:
        """Project queries (128, n, W) to (heads, n, W, channels)."""
        return self._project(self.norm_q(x.movedim(0, -1)), 0)

    def keys(self, x: Tensor) -> Tensor:
        """Project keys (128, h, w) to (heads, h, w, channels)."""
        return self._project(self.norm_k(x.movedim(0, -1)), 1)

    def _project(self, x: Tensor, part: int) -> Tensor:
        weight = self.attention.in_proj_weight.chunk(3)[part]
        bias = self.attention.in_proj_bias.chunk(3)[part]
        heads: Tensor = F.linear(x, weight, bias).unflatten(-1, (HEADS, -1)).movedim(-2, 0)
        return heads


class Tile(NamedTuple):
    """Block of adjacent pixel columns.

    Attributes:
        pixels: Pixel columns of the tile (t).
        patches: Patch columns that at least one of them sees (l).
        hidden: Boolean mask (t, l), True if the pixel column does not see the patch column.
    """

    pixels: slice
    patches: slice
    hidden: Tensor

    def to(self, device: torch.device) -> "Tile":
        """Return a copy with the mask on `device`."""
        return self._replace(hidden=self.hidden.to(device))


def columns(pixels: int, patches: int) -> Iterator[Tile]:
    """Yield the tiles of the horizontal axis for the given numbers of pixels and patches."""
    lefts, rights = reach(pixels, patches)
    width = -(-pixels // patches) * TILE
    for start in range(0, pixels, width):
        tile = slice(start, min(pixels, start + width))
        near = slice(int(lefts[start]), int(rights[tile.stop - 1]))
        index = torch.arange(near.start, near.stop)
        yield Tile(tile, near, (index < lefts[tile, None]) | (index >= rights[tile, None]))


def attention(queries: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    """Compute the attention weights (n*t, m*l) of n x t pixels on m x l patches, averaged over the heads.

    Args:
        queries: Queries of a tile (heads, n, t, channels).
        keys: Keys of the patches that it sees (heads, m, l, channels).
        hidden: Boolean mask (t, l), True if a pixel column does not see a patch column.
    """
    scores = queries.flatten(1, 2) @ keys.flatten(1, 2).mT / keys.shape[-1] ** 0.5
    grid = scores.view(*queries.shape[:3], *keys.shape[1:3])  # (heads, n, t, m, l), a view
    grid.masked_fill_(hidden[:, None], -torch.inf)
    weights: Tensor = scores.softmax(-1).mean(0)
    return weights


def reach(pixels: int, patches: int) -> tuple[Tensor, Tensor]:
    """Return the first patch that each pixel of an axis sees, and the patch after the last one.

    They are computed in fp32, as in the official code.
    """
    position = (torch.arange(pixels, dtype=torch.float32) + 0.5) / pixels
    first = ((position - REACH).clamp(0, 1) * patches).floor().long()
    last = ((position + REACH).clamp(0, 1) * patches).ceil().long()
    return first, last


def runs(tops: Tensor, bottoms: Tensor, most: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of up to `most` adjacent pixel rows that see the same rows of patches."""
    changes = (tops.diff().bool() | bottoms.diff().bool()).nonzero().flatten() + 1
    edges = [0, *changes.tolist(), len(tops)]
    for start, stop in pairwise(edges):
        for first in range(start, stop, most):
            yield first, min(stop, first + most)
