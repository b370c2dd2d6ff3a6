"""Tiles of a patch grid: which patches attend together in windowed attention, and which patches they see."""

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]  # patches along height and width: (h, w)

GROUP: Final = 8  # side of a group of tiles in patches, about


class Tiles(NamedTuple):
    """Tiles of an image as indices of its tokens, in G groups of s x s patches that together see K x K patches.

    Attributes:
        queries: Tokens of each group (G, s * s); those at the end of an axis repeat its last patch.
        keys: Patches that some tile of the group sees, as tokens (G, K * K).
        mask: 0 for keys that a query sees, -inf for others, class and register tokens first: (G, 1, s * s or 1,
            prefix + K * K); None if all queries see all keys.
        places: Place of each patch in the flattened `queries` (N,).
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    places: Tensor


class _Axis(NamedTuple):
    """Groups along one axis of n patches: queries (groups, s), keys (groups, K) and which of them each query sees
    (groups, s or 1, K); group of each patch (n,) and its place in that group (n,).
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor
    group: Tensor
    place: Tensor


def tiles(grid: Grid, t: int, k: int, prefix: int, traced: bool, device: torch.device, dtype: torch.dtype) -> Tiles:
    """Divide a patch grid into tiles; the last one of each axis is shifted inward, and so is what they see.

    Tiles of less than about 8 x 8 patches are computed in groups of this size, because neighbors see nearly the same
    keys, which are then gathered once. With 14 x 14 keys and tiles of 3 x 3, groups of 9 x 9 take 0.44 of the time (a
    layer of ViT-B at 672 x 896, one core of an Intel Xeon). Larger groups would compare queries with more keys that
    they do not see.

    Args:
        grid: Patch grid (h, w).
        t: Side of a tile in patches.
        k: Side of the window of keys in patches, at least t.
        prefix: Number of class and register tokens before the patches.
        traced: True if the size of the grid is not known yet. Tiles and windows then have full sides on small images,
            and a mask.
        device: Device of the indices.
        dtype: Type of the mask.
    """
    side = t * max(1, round(GROUP / t))
    rows, columns = (_axis(n, t, k, side, traced, device) for n in grid)
    width = grid[1]
    mask = None
    if traced or side > t:
        seen = rows.seen[:, None, :, None, :, None] & columns.seen[None, :, None, :, None]  # (R, C, s, s, K, K)
        seen = seen.flatten(4, 5).flatten(2, 3).flatten(0, 1)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -math.inf)
        mask = torch.nn.functional.pad(mask, (prefix, 0))[:, None]
    across = columns.queries.shape[1]
    area = rows.queries.shape[1] * across
    of_rows = rows.group * (columns.queries.shape[0] * area) + rows.place * across
    places = (of_rows[:, None] + columns.group * area + columns.place).flatten()
    queries, keys = (prefix + _pairs(rows[i] * width, columns[i]) for i in (0, 1))
    return Tiles(queries, keys, mask, places)


def _axis(n: int, t: int, k: int, side: int, traced: bool, device: torch.device) -> _Axis:
    reach = k + side - t  # from the first key of the first tile of a group to the last key of the last one
    single = side == t
    if not traced:
        t, k, side, reach = (min(length, n) for length in (t, k, side, reach))
    starts = torch.arange(0, n, side, device=device)
    queries = (starts[:, None] + torch.arange(side, device=device)).clamp(max=n - 1)
    tile = (queries // t * t).clamp(max=n - t).clamp(min=0)  # where the tile of each query starts
    first = (tile - (k - t) // 2).clamp(max=n - k).clamp(min=0)
    keys = first[:, :1].clamp(max=n - reach).clamp(min=0) + torch.arange(reach, device=device)
    offset = keys[:, None] - (first[:, :1] if single else first)[:, :, None]
    seen = (offset >= 0) & (offset < k) & (keys < n)[:, None]
    patches = torch.arange(n, device=device)
    group = patches // side
    return _Axis(queries, keys.clamp(max=n - 1), seen, group, patches - side * group)


def _pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the sums of all pairs: (R, a) and (C, b) -> (R * C, a * b)."""
    return (rows[:, None, :, None] + columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)
