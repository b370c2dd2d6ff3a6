"""The networks of AnyUp around its attention, named as in the official weights.

Those that run at full size are convolutions of 1 x 1 between norms. They go through the image in pieces and
in place, so that no more than two tensors of 128 channels exist at once.

Shapes: C maps, H x W pixels, h x w patches, 128 channels inside.
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
    """A first layer and two residual blocks, (c, H, W) -> (128, H, W)."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__(first, Residual(), Residual())


class Pointwise(nn.Conv2d):
    """A convolution of 1 x 1, (c, H, W) -> (128, H, W), a piece of the image at a time; of 128 channels in place."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result = x if len(x) == WIDTH else x.new_empty(WIDTH, *x.shape[1:])
        for out, piece in zip(pieces(result), pieces(x.flatten(1)), strict=True):
            out.copy_(self.product(piece))
        return result

    def product(self, piece: Tensor) -> Tensor:
        """Of columns (c, n)."""
        return self.weight[:, :, 0, 0] @ piece


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), in place: norms need the whole image, the rest goes in pieces."""

    def __init__(self) -> None:
        super().__init__()
        half = [[nn.GroupNorm(8, WIDTH), nn.SiLU(), Pointwise(WIDTH)] for _ in range(2)]
        self.block = nn.Sequential(*half[0], *half[1])

    def forward(self, x: Tensor) -> Tensor:
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
    """Views (c, n) of the pixels of (c, ...)."""
    views: tuple[Tensor, ...] = x.flatten(1).split(BAND // WIDTH, dim=1)
    return views


def activated(x: Tensor, norm: nn.Module) -> Iterator[Tensor]:
    """silu(norm(x)) in pieces (c, n)."""
    assert isinstance(norm, nn.GroupNorm)
    variance, mean = torch.var_mean(x.unflatten(0, (norm.num_groups, -1)).flatten(1), dim=1, correction=0)  # (groups)
    each = x.shape[0] // norm.num_groups
    scale = norm.weight * (variance + norm.eps).rsqrt().repeat_interleave(each)
    shift = norm.bias - mean.repeat_interleave(each) * scale
    for piece in pieces(x):
        yield F.silu(torch.addcmul(shift[:, None], piece, scale[:, None]), inplace=True)


class Unification(nn.Module):
    """Any number of maps (C, h, w) to 128 channels: how their 5 x 5 surroundings respond to 128 learned kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(WIDTH, 1, 5, 5))

    def forward(self, maps: Tensor) -> Tensor:
        channels, height, width = maps.shape
        inside = F.conv2d(F.pad(maps.new_ones(1, 1, height, width), [2] * 4), maps.new_ones(1, 1, 5, 5))[0]  # pixels
        padded = F.pad(maps, [2] * 4)[:, None]  # (C, 1, h + 4, w + 4)
        result = maps.new_empty(WIDTH, height, width)
        rows = max(1, BAND // (WIDTH * channels * width))
        for top in range(0, height, rows):
            stop = min(height, top + rows)
            response = F.conv2d(padded[:, :, top : stop + 4], self.basis) / inside[:, top:stop]  # (C, 128, n, w)
            # The official code reads C x 128 responses as 128 x C, so that the softmax does not run over the kernels of
            # one map unless C is 1. The weights were trained with it.
            result[:, top:stop] = response.reshape(WIDTH, channels, stop - top, width).softmax(0).mean(1)
        return result


class Smoothing(nn.Conv2d):
    """A convolution of 3 x 3 over the patch grid, (256, h, w) -> (128, h, w), mirrored at the border."""

    def __init__(self) -> None:
        super().__init__(2 * WIDTH, WIDTH, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # A grid of one row or column has nothing to mirror; the official code refuses it.
        mode = "reflect" if min(x.shape[1:]) > 1 else "replicate"
        return F.conv2d(F.pad(x[None], [1] * 4, mode=mode), self.weight)[0].to(x.dtype)


class Rotation(nn.Module):
    """Rotary position encoding of (128, H, W), in place: rows and columns run from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        frequencies = (100 ** torch.linspace(0, -1, WIDTH // 4)).repeat(2)  # 64
        nothing = torch.zeros(WIDTH // 2)
        axes = [torch.cat([frequencies, nothing]), torch.cat([nothing, frequencies])]
        self.freqs = nn.Parameter(2 * math.pi * torch.stack(axes))

    def forward(self, x: Tensor) -> Tensor:
        ys, xs = (torch.linspace(0, 1, side, device=x.device, dtype=x.dtype) for side in x.shape[1:])
        step = max(1, BAND // x[:, 0].numel())
        for rows, y in zip(x.split(step, dim=1), ys.split(step), strict=True):
            angle = self.freqs[0, :, None, None] * y[:, None] + self.freqs[1, :, None, None] * xs  # (128, n, W)
            turned = torch.cat([-rows[WIDTH // 2 :], rows[: WIDTH // 2]]).mul_(angle.sin())
            rows.mul_(angle.cos_()).add_(turned)
        return x
