"""Encoders of AnyUp before its attention, with module names as in the official weights.

The full-size layers are 1 x 1 convolutions between norms. They process the image in pieces and in place, so that at
most two tensors of 128 channels exist at the same time.

Shapes: C maps, H x W pixels, h x w patches, 128 internal channels.
"""

import math
from collections.abc import Iterator
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.refinement.base import BAND

WIDTH: Final = 128  # channels


class Encoder(nn.Sequential):
    """First layer and two residual blocks, (c, H, W) -> (128, H, W)."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__(first, Residual(), Residual())


class Pointwise(nn.Conv2d):
    """1 x 1 convolution, (c, H, W) -> (128, H, W), one piece of the image at a time; in place if c is 128."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the result (128, H, W) for x (c, H, W), which is overwritten if c is 128."""
        result = x if len(x) == WIDTH else x.new_empty(WIDTH, *x.shape[1:])
        for out, piece in zip(pieces(result), pieces(x.flatten(1)), strict=True):
            out.copy_(self.product(piece))
        return result

    def product(self, piece: Tensor) -> Tensor:
        """Return the convolution (128, n) of the pixels (c, n)."""
        return self.weight[:, :, 0, 0] @ piece


class Residual(nn.Module):
    """Residual block x + conv(silu(norm(conv(silu(norm(x)))))), in place.

    The statistics of the norms need the whole image; the other operations run in pieces.
    """

    def __init__(self) -> None:
        super().__init__()
        half = [[nn.GroupNorm(8, WIDTH), nn.SiLU(), Pointwise(WIDTH)] for _ in range(2)]
        self.block = nn.Sequential(*half[0], *half[1])

    def forward(self, x: Tensor) -> Tensor:
        """Overwrite x (128, H, W) with the result, and return it."""
        first, _, into, second, _, back = self.block
        assert isinstance(into, Pointwise)
        assert isinstance(back, Pointwise)
        hidden = torch.empty_like(x)
        for out, piece in zip(pieces(hidden), activated(x, first), strict=True):
            out.copy_(into.product(piece))
        for out, piece in zip(pieces(x), activated(hidden, second), strict=True):
            out.add_(back.product(piece))
        return x


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Split the pixels of x (c, ...) into views (c, n)."""
    views: tuple[Tensor, ...] = x.flatten(1).split(BAND // WIDTH, dim=1)
    return views


def activated(x: Tensor, norm: nn.Module) -> Iterator[Tensor]:
    """Yield silu(norm(x)) in pieces (c, n)."""
    assert isinstance(norm, nn.GroupNorm)
    variance, mean = torch.var_mean(x.unflatten(0, (norm.num_groups, -1)).flatten(1), dim=1, correction=0)  # (groups)
    each = x.shape[0] // norm.num_groups
    scale = norm.weight * (variance + norm.eps).rsqrt().repeat_interleave(each)
    shift = norm.bias - mean.repeat_interleave(each) * scale
    for piece in pieces(x):
        yield F.silu(torch.addcmul(shift[:, None], piece, scale[:, None]), inplace=True)


class Unification(nn.Module):
    """Conversion of any number of maps (C, h, w) to 128 channels, their responses to 128 learned 5 x 5 kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(WIDTH, 1, 5, 5))

    def forward(self, maps: Tensor) -> Tensor:
        """Return the mean responses (128, h, w) of the maps (C, h, w)."""
        channels, height, width = maps.shape
        # Number of grid cells under the kernel at each position.
        inside = F.conv2d(F.pad(maps.new_ones(1, 1, height, width), [2] * 4), maps.new_ones(1, 1, 5, 5))[0]
        padded = F.pad(maps, [2] * 4)[:, None]  # (C, 1, h + 4, w + 4)
        result = maps.new_empty(WIDTH, height, width)
        rows = max(1, BAND // (WIDTH * channels * width))
        for top in range(0, height, rows):
            stop = min(height, top + rows)
            response = F.conv2d(padded[:, :, top : stop + 4], self.basis) / inside[:, top:stop]  # (C, 128, n, w)
            # The official code reshapes C x 128 responses to 128 x C, so the softmax does not run over the kernels of
            # one map unless C is 1. The weights were trained this way.
            result[:, top:stop] = response.reshape(WIDTH, channels, stop - top, width).softmax(0).mean(1)
        return result


class Smoothing(nn.Conv2d):
    """3 x 3 convolution over the patch grid, (256, h, w) -> (128, h, w), with reflection padding."""

    def __init__(self) -> None:
        super().__init__(2 * WIDTH, WIDTH, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the result (128, h, w) for x (256, h, w)."""
        # Reflection padding needs at least two rows and columns; the official code raises an error for smaller grids.
        mode = "reflect" if min(x.shape[1:]) > 1 else "replicate"
        return F.conv2d(F.pad(x[None], [1] * 4, mode=mode), self.weight)[0].to(x.dtype)


class Rotation(nn.Module):
    """Rotary positional embedding of (128, H, W), in place; row and column positions range from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        frequencies = (100 ** torch.linspace(0, -1, WIDTH // 4)).repeat(2)  # 64
        nothing = torch.zeros(WIDTH // 2)
        axes = [torch.cat([frequencies, nothing]), torch.cat([nothing, frequencies])]
        self.freqs = nn.Parameter(2 * math.pi * torch.stack(axes))

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x (128, H, W) in place, and return it."""
        ys, xs = (torch.linspace(0, 1, side, device=x.device, dtype=x.dtype) for side in x.shape[1:])
        step = max(1, BAND // x[:, 0].numel())
        for rows, y in zip(x.split(step, dim=1), ys.split(step), strict=True):
            angle = self.freqs[0, :, None, None] * y[:, None] + self.freqs[1, :, None, None] * xs  # (128, n, W)
            turned = torch.cat([-rows[WIDTH // 2 :], rows[: WIDTH // 2]]).mul_(angle.sin())
            rows.mul_(angle.cos_()).add_(turned)
        return x
