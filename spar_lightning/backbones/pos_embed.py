"""Learned absolute positional embeddings on the patch grid of an image: resized, or averaged over native windows."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.backbones.attention import WindowedAttention
from spar_lightning.backbones.tiles import Grid


def resized(table: Tensor, grid: Grid, native: Grid) -> Tensor:
    """Resize a positional embedding (1, native h * native w, D) to a patch grid: (1, h * w, D).

    The interpolation is bicubic without antialiasing, as for SigLIP2 and OpenCLIP in the paper's code. timm
    uses antialiasing, and its result differs by 0.1.
    """
    if grid == native:
        return table
    square = table.transpose(1, 2).unflatten(2, native)
    return F.interpolate(square, grid, mode="bicubic", align_corners=False, antialias=False).flatten(2).transpose(1, 2)


def antialiased(table: Tensor, grid: Grid, native: Grid, mode: str) -> Tensor:
    """Resize a positional embedding as `resized`, but with antialiasing, as timm (bicubic) and TIPSv2 (bilinear)."""
    if grid == native:
        return table
    square = table.transpose(1, 2).unflatten(2, native).float()
    square = F.interpolate(square, grid, mode=mode, align_corners=False, antialias=True)
    return square.flatten(2).transpose(1, 2).to(table.dtype)


def positions(table: Tensor, grid: Grid, native: Grid, windows: WindowedAttention | None) -> Tensor:
    """Return the positional embedding (1, h * w, D) of an image for a table (1, native h * native w, D).

    Args:
        table: Positional embedding of the native grid.
        grid: Patch grid (h, w) of the image.
        native: Native grid.
        windows: Settings of windowed attention, or None.
    """
    return placed(partial(resized, table, native=native), grid, native, windows)


def placed(resize: Callable[[Grid], Tensor], grid: Grid, native: Grid, windows: WindowedAttention | None) -> Tensor:
    """Return the positional embedding (1, h * w, D) of an image: resized to it, or averaged over native windows.

    Args:
        resize: Function that resizes the positional embedding to a grid.
        grid: Patch grid (h, w) of the image.
        native: Native grid.
        windows: Settings of windowed attention, or None.
    """
    if windows is None or windows.positions == "stretched":
        return resize(grid)
    if any(isinstance(n, torch.SymInt) for n in grid):
        return _placed_when_traced(resize, grid, native)
    window = (min(grid[0], native[0]), min(grid[1], native[1]))  # windows are clamped to the image
    table = resize(window)  # (1, window h * window w, D)
    if window == grid:
        return table
    rows, columns = (_shares(n, g, table.device) for n, g in zip(grid, window, strict=True))
    with _without_autocast(table.device):
        mean = torch.einsum("ip,jq,bpqd->bijd", rows, columns, table.float().unflatten(1, window))
    return mean.flatten(1, 2).to(table.dtype)


def _placed_when_traced(resize: Callable[[Grid], Tensor], grid: Grid, native: Grid) -> Tensor:
    """Return the average over native windows for a grid whose sides are not known yet, as in an export.

    A graph has no branches, so each axis computes both cases, the clamped window and the average, and selects one.
    """
    (h, w), (g, f) = grid, native
    table = resize(native)
    device = table.device
    short, narrow = ((torch.arange(m, device=device) < n).sum() < m for n, m in ((h, g), (w, f)))
    rows, columns = _shares(h, g, device), _shares(w, f, device)  # not a number on a shorter axis, and not selected

    def square(height: int, width: int) -> Tensor:
        table: Tensor = resize((height, width)).float().unflatten(1, (height, width))
        return table

    def tall(width: int) -> Tensor:  # (1, h, width, D)
        return torch.where(short, square(h, width), torch.einsum("ip,bpjd->bijd", rows, square(g, width)))

    with _without_autocast(device):
        embedding = torch.where(narrow, tall(w), torch.einsum("jq,biqd->bijd", columns, tall(f)))
    return embedding.flatten(1, 2).to(table.dtype)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast, which does not know the meta device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _shares(n: int, window: int, device: torch.device) -> Tensor:
    """Return how often each of n patches is at each place of a window, over all windows at patch offsets: (n, window).

    The rows add up to 1.
    """
    offsets = torch.arange(n, device=device)[:, None] - torch.arange(
        window, device=device
    )  # of the window in which a patch has this place
    present = ((offsets >= 0) & (offsets <= n - window)).float()
    return present / present.sum(1, keepdim=True)
