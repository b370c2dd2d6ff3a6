"""Attention of pixels to the patches near them, in bands of rows: exact, without a mask of pixels times patches.

A pixel sees the patches within a tenth of the image's height and width. Pixels of neighbouring rows mostly see
the same rows of patches; such rows make a band, in tiles of some columns, whose keys are cut out of the grid. A mask
is left over for the columns alone.

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
REACH: Final = 0.1  # of the image's side, to each direction
TILE: Final = 8  # columns of patches: wider tiles are fewer, but hide more of their keys


class WindowAttention(nn.Module):
    """The last part of AnyUp; its modules are named as in the official weights, of which two go unused.

    Args:
        width: Channels of queries and keys.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cross_attn = Projections(width)
        self.conv2d = nn.Conv2d(width, width, 3, padding=1, bias=False)

    @torch.no_grad()
    def rows(self, queries: Tensor, keys: Tensor, values: Tensor) -> Iterator[Tensor]:
        """Averages (C, n, W) of the values, n rows of pixels at a time, from top to bottom.

        Args:
            queries: (128, H, W).
            keys: (128, h, w).
            values: (C, h, w), in any number.
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
                with torch.autocast(values.device.type, enabled=False):  # close classes differ by less than bf16 holds
                    average = values[:, seen, tile.patches].flatten(1) @ weights.to(values.dtype).T
                result[:, :, tile.pixels] = average.unflatten(1, (stop - start, -1))
            yield result

    def _smoothed(self, queries: Tensor, start: int, stop: int) -> Tensor:
        """The rows start..stop-1 after the convolution of 3 x 3, zeros outside: (128, n, W)."""
        above, below = int(start > 0), int(stop < queries.shape[1])
        padded = F.pad(queries[None, :, start - above : stop + below], (1, 1, 1 - above, 1 - below))
        return F.conv2d(padded, self.conv2d.weight)[0].to(queries.dtype)


class Projections(nn.Module):
    """Norms and projections of queries and keys.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_q = nn.RMSNorm(width)
        self.norm_k = nn.RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, HEADS)  # holds weights, is never called

    def queries(self, x: Tensor) -> Tensor:
        """(heads, n, W, channels) of (128, n, W)."""
        return self._project(self.norm_q(x.movedim(0, -1)), 0)

    def keys(self, x: Tensor) -> Tensor:
        """(heads, h, w, channels) of (128, h, w)."""
        return self._project(self.norm_k(x.movedim(0, -1)), 1)

    def _project(self, x: Tensor, part: int) -> Tensor:
        weight = self.attention.in_proj_weight.chunk(3)[part]
        bias = self.attention.in_proj_bias.chunk(3)[part]
        heads: Tensor = F.linear(x, weight, bias).unflatten(-1, (HEADS, -1)).movedim(-2, 0)
        return heads


class Tile(NamedTuple):
    """Neighbouring columns of pixels.

    Attributes:
        pixels: The columns.
        patches: The columns of patches that any of them sees.
        hidden: Which of these each of them does not see (t, l).
    """

    pixels: slice
    patches: slice
    hidden: Tensor

    def to(self, device: torch.device) -> "Tile":
        """The same on a device."""
        return self._replace(hidden=self.hidden.to(device))


def columns(pixels: int, patches: int) -> Iterator[Tile]:
    """The tiles of an axis."""
    lefts, rights = reach(pixels, patches)
    width = -(-pixels // patches) * TILE
    for start in range(0, pixels, width):
        tile = slice(start, min(pixels, start + width))
        near = slice(int(lefts[start]), int(rights[tile.stop - 1]))
        index = torch.arange(near.start, near.stop)
        yield Tile(tile, near, (index < lefts[tile, None]) | (index >= rights[tile, None]))


def attention(queries: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    """Weights (n*t, m*l) of a tile of n x t pixels on m x l patches, averaged over the heads.

    Args:
        queries: (heads, n, t, channels).
        keys: (heads, m, l, channels).
        hidden: Columns of patches that a column of pixels does not see (t, l).
    """
    scores = queries.flatten(1, 2) @ keys.flatten(1, 2).mT / keys.shape[-1] ** 0.5
    grid = scores.view(*queries.shape[:3], *keys.shape[1:3])  # (heads, n, t, m, l), the same memory
    grid.masked_fill_(hidden[:, None], -torch.inf)
    weights: Tensor = scores.softmax(-1).mean(0)
    return weights


def reach(pixels: int, patches: int) -> tuple[Tensor, Tensor]:
    """First patch that each pixel of an axis sees, and the one after the last; in fp32, as the official code."""
    position = (torch.arange(pixels, dtype=torch.float32) + 0.5) / pixels
    first = ((position - REACH).clamp(0, 1) * patches).floor().long()
    last = ((position + REACH).clamp(0, 1) * patches).ceil().long()
    return first, last


def runs(tops: Tensor, bottoms: Tensor, most: int) -> Iterator[tuple[int, int]]:
    """Start and stop of consecutive rows of pixels that see the same rows of patches, `most` at once."""
    changes = (tops.diff().bool() | bottoms.diff().bool()).nonzero().flatten() + 1
    edges = [0, *changes.tolist(), len(tops)]
    for start, stop in pairwise(edges):
        for first in range(start, stop, most):
            yield first, min(stop, first + most)
