"""Tiles of a patch grid: which patches attend together in windowed attention, and which patches they see."""

from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]  # patches along height and width: (h, w)


class Tiles(NamedTuple):
    """Tiles of an image as indices of its tokens, for T tiles of t x t patches that see k x k patches.

    Attributes:
        queries: Tokens of each tile (T, t * t).
        keys: Patches that each tile sees, as tokens (T, k * k).
        mask: Keys that exist, class and register tokens first (T, 1, 1, prefix + k * k); None if all do.
        places: Place of each patch in the flattened `queries` (N,).
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    places: Tensor


class _Axis(NamedTuple):
    """Tiles along one axis of n patches: queries (tiles, t), keys (tiles, k) and whether they exist; tile of each patch
    (n,) and its place in that tile (n,).
    """

    queries: Tensor
    keys: Tensor
    exists: Tensor
    tile: Tensor
    place: Tensor


def tiles(grid: Grid, t: int, k: int, prefix: int, traced: bool, device: torch.device) -> Tiles:
    """Divide a patch grid into tiles; the last one of each axis is shifted inward, and so is what they see.

    Args:
        grid: Patch grid (h, w).
        t: Side of a tile in patches.
        k: Side of the window of keys in patches, at least t.
        prefix: Number of class and register tokens before the patches.
        traced: True if the size of the grid is not known yet. Tiles and windows then have full sides on small images,
            and a mask.
        device: Device of the indices.
    """
    rows, columns = (_axis(n, t, k, traced, device) for n in grid)
    width = grid[1]
    keys = prefix + _pairs(rows.keys * width, columns.keys)
    mask = None
    if traced:
        exists = _pairs(rows.exists.long(), columns.exists.long()) == 2
        mask = torch.nn.functional.pad(exists, (prefix, 0), value=True)[:, None, None]
    side = columns.queries.shape[1]
    area = rows.queries.shape[1] * side
    of_rows = rows.tile * (columns.queries.shape[0] * area) + rows.place * side
    places = (of_rows[:, None] + columns.tile * area + columns.place).flatten()
    return Tiles(prefix + _pairs(rows.queries * width, columns.queries), keys, mask, places)


def _axis(n: int, t: int, k: int, traced: bool, device: torch.device) -> _Axis:
    if not traced:
        t, k = min(t, n), min(k, n)
    starts = torch.arange(0, n, t, device=device).clamp(max=n - t).clamp(min=0)
    first = (starts - (k - t) // 2).clamp(max=n - k).clamp(min=0)
    queries = starts[:, None] + torch.arange(t, device=device)
    keys = first[:, None] + torch.arange(k, device=device)
    patches = torch.arange(n, device=device)
    tile = patches // t
    return _Axis(queries.clamp(max=n - 1), keys.clamp(max=n - 1), keys < n, tile, patches - starts[tile])


def _pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the sums of all pairs: (R, a) and (C, b) -> (R * C, a * b)."""
    return (rows[:, None, :, None] + columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)
