"""Windowed attention: each patch attends to as many patches as in pretraining, on an image of any size.

On a large image, full attention spreads over more patches than the network has seen, and features mix in what is far
away. Windowed attention bounds it, without training and without new parameters: queries in tiles of t x t patches
attend to the k x k patches around their tile. The key window is shifted inward at the borders of the image, so every
patch sees min(k, h) x min(k, w) patches. Images of at most k x k patches get full attention, bit for bit. The cost per
patch is constant.

Class and register tokens are seen by all patches, and see all patches. Tiles, or groups of small tiles, have equal
shapes, so one call of `scaled_dot_product_attention` computes many of them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.backbones.tiles import Grid, Tiles, tiles
from spar_lightning.errors import UserError, check_at_least

# Elements of the keys that are gathered at once, by device type. On a CPU they stay in its cache: attention of 64 x 128
# patches (t 8, k 32) took 299 ms instead of 434 ms (2 cores of an AMD EPYC). Elsewhere, keys and values together take
# 256 MiB in bf16.
GATHERED: Final = {"cpu": 2**20}
GATHERED_ELSEWHERE: Final = 2**26

# Patches of the largest image whose tiles are cached: at most a few MB each.
CACHED: Final = 2**12


@dataclass(frozen=True)
class WindowedAttention:
    """Settings of windowed attention.

    Args:
        reach: Side k of the key window, as a multiple of the native grid. 1 is what the network saw in pretraining; a
            very large value gives full attention, to which `temperature` and `positions` still apply.
        tile: Side t of the query tiles in patches; null uses a quarter of the native grid. Smaller tiles are nearer to
            a window centered on each patch, and slower.
        temperature: `log` multiplies the logits by log(n) / log(n0) where a patch attends to more patches (n) than in
            pretraining (n0), so that the entropy of attention stays the same, also for class and register tokens. It
            has no effect with a reach of 1.
        positions: `stretched` resizes the positional embedding to the image. `windowed` gives each patch the mean of
            the embeddings that it has in all native windows that contain it; for RoPE, the native distance of patches.

    Raises:
        UserError: A setting is out of range.
    """

    reach: float = 1.0
    tile: int | None = None
    temperature: Literal["none", "log"] = "none"
    positions: Literal["stretched", "windowed"] = "stretched"

    def __post_init__(self) -> None:
        if not 1 <= self.reach < math.inf:
            raise UserError(
                f"attention.reach must be at least 1, but got {self.reach:g}. 1 is the native grid of the network."
            )
        check_at_least(1, **{"attention.tile": self.tile})
        for name, allowed in (("temperature", ("none", "log")), ("positions", ("stretched", "windowed"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"attention.{name} must be {' or '.join(allowed)}, but got {getattr(self, name)!r}.")

    def sides(self, native: int) -> tuple[int, int]:
        """Return the sides (t, k) of query tiles and key windows in patches.

        Args:
            native: Side of the native grid in patches.

        Raises:
            UserError: The tiles are larger than the key windows.
        """
        keys = round(self.reach * native)
        tile = max(1, native // 4) if self.tile is None else self.tile
        if tile > keys:
            raise UserError(
                f"attention.tile must be at most {keys}, the side of the key window in patches, but got {tile}."
            )
        return tile, keys

    def identity(self, native: int) -> dict[str, Any]:
        """Return what the result depends on, as plain data, for a native grid of this side."""
        tile, keys = self.sides(native)
        return {"tile": tile, "keys": keys, "temperature": self.temperature, "positions": self.positions}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grids: Sequence[Grid],
    prefix: int,
    windows: WindowedAttention | None,
    native: int,
) -> Tensor:
    """Compute attention within each image of a packed sequence, full or windowed: (B, heads, sum of prefix+N_i, width).

    Args:
        query: Queries (B, heads, sum of prefix+N_i, width), normalized and rotated as the network does.
        key: Keys of the same shape.
        value: Values of the same shape.
        grids: Patch grid (h, w) of each image.
        prefix: Number of class and register tokens of each image.
        windows: Settings of windowed attention; None computes full attention.
        native: Side of the native grid in patches.
    """
    if len(grids) == 1:
        return _attend(query, key, value, grids[0], prefix, windows, native)
    lengths = [prefix + h * w for h, w in grids]
    images = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), grids, strict=True)
    return torch.cat([_attend(q, k, v, grid, prefix, windows, native) for q, k, v, grid in images], dim=2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    prefix: int,
    windows: WindowedAttention | None,
    native: int,
) -> Tensor:
    """Compute attention of one image."""
    if windows is None:
        return F.scaled_dot_product_attention(query, key, value)
    (h, w), (t, k) = grid, windows.sides(native)
    traced = isinstance(h, torch.SymInt) or isinstance(w, torch.SymInt)  # export: the size is not known yet
    if windows.temperature == "log" and k > native:
        query = query * _temperature(grid, k, native, query.device).to(query.dtype)
    if not traced and h <= k and w <= k:
        return F.scaled_dot_product_attention(query, key, value)

    if traced or torch.compiler.is_compiling() or h * w > CACHED:
        plan = tiles(grid, t, k, prefix, traced, query.device, query.dtype)
    else:
        plan = _cached_tiles(grid, t, k, prefix, query.device, query.dtype)
    # All heads of a token are gathered at once, and groups of tiles take the place of the batch:
    # (groups, B * heads, n, width).
    batch, heads = query.shape[:2]
    rows = [tokens.permute(2, 0, 1, 3).flatten(1) for tokens in (query, key, value)]  # (prefix+N, B * heads * width)
    parts = []
    for query_index, key_index, mask in _chunks(plan, query, key, value):
        queries, keys, values = (
            F.embedding(index, table).unflatten(2, (batch * heads, -1)).transpose(1, 2)
            for index, table in zip((query_index, key_index, key_index), rows, strict=True)
        )
        if prefix:  # expanded and not gathered: the sum of many gradients would be inexact in bf16
            keys, values = (
                torch.cat([each[:, :, :prefix].flatten(0, 1).expand(tiled.shape[0], -1, -1, -1), tiled], dim=2)
                for each, tiled in ((key, keys), (value, values))
            )
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        parts.append(attended.transpose(1, 2).flatten(0, 1).flatten(1))  # (groups * s * s, B * heads * width)
    out: Tensor = (
        F.embedding(plan.places, torch.cat(parts) if len(parts) > 1 else parts[0])
        .unflatten(1, (batch, heads, -1))
        .permute(1, 2, 0, 3)
    )
    if prefix:
        first = F.scaled_dot_product_attention(query[:, :, :prefix], key, value)
        out = torch.cat([first, out], dim=2)
    return out


@lru_cache(maxsize=16)  # all blocks have the same tiles, and often the next images, too
def _cached_tiles(grid: Grid, t: int, k: int, prefix: int, device: torch.device, dtype: torch.dtype) -> Tiles:
    with torch.inference_mode(False):  # a later call may need gradients
        return tiles(grid, t, k, prefix, False, device, dtype)


def _chunks(plan: Tiles, query: Tensor, key: Tensor, value: Tensor) -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
    """Split the indices of queries and keys, and the mask, into parts of some groups of tiles.

    With gradients there is one part, because each part would cost a gradient of all keys.
    """
    gradients = query.requires_grad or key.requires_grad or value.requires_grad
    if gradients or torch.compiler.is_compiling():
        return [(plan.queries, plan.keys, plan.mask)]
    of_group = query.shape[0] * query.shape[1] * query.shape[3] * plan.keys.shape[1]
    count = max(1, GATHERED.get(query.device.type, GATHERED_ELSEWHERE) // of_group)
    queries, keys = plan.queries.split(count), plan.keys.split(count)
    return zip(queries, keys, [None] * len(keys) if plan.mask is None else plan.mask.split(count), strict=True)


def _temperature(grid: Grid, k: int, native: int, device: torch.device) -> Tensor:
    """Return the factor log(n) / log(n0) of the logits for n patches instead of n0, at least 1."""
    patches = torch.arange(k, device=device)
    h, w = ((patches < side).sum() for side in grid)  # min(k, side), also where the side is not known yet
    factor: Tensor = 1 + (h * w / native**2).log() / math.log(native**2)  # exactly 1 for n = n0
    return factor.clamp(min=1)
