"""AnyUp: maps of any kind, brought from the patch grid to the size of an image, guided by the image.

Wimmer et al., AnyUp: Universal Feature Upsampling (ICLR 2026, arXiv 2510.12764): every pixel takes an average of
the maps at the patches near it, weighted by attention between image and patches. Written anew, so that the official
weights (CC-BY-4.0, github.com/wimmerth/anyup) give the official numbers in a fraction of the memory: the
networks at full size are convolutions of 1 x 1 between norms, and run through the image in pieces,
in place; the attention runs in bands of rows.

Shapes: C maps, H x W pixels of the image, h x w patches, 128 channels inside.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.backbones.weights import WeightsError, check_fit, read, tensors_digest
from spar_lightning.errors import UserError, nearest
from spar_lightning.label_map import BAND
from spar_lightning.refine.window_attention import WindowAttention

WIDTH: Final = 128  # channels
BILINEAR: Final = "bilinear"  # in settings: no AnyUp
RELEASES: Final = "https://github.com/wimmerth/anyup/releases/download"
OFFICIAL: Final = {
    "anyup": f"{RELEASES}/checkpoint_v2/anyup_multi_backbone.pth",
    "anyup_paper": f"{RELEASES}/checkpoint/anyup_paper.pth",
}


class AnyUp(nn.Module):
    """Upsampling of any maps, guided by an image; for inference alone.

    Args:
        weights: `anyup`, trained with five backbones, SigLIP2 among them, or `anyup_paper`, trained with DINOv2 alone,
            both downloaded once (3.5 MB); the path of either file; null for random weights.
    """

    mean = (0.485, 0.456, 0.406)  # ImageNet's, whatever backbone the maps come from
    std = (0.229, 0.224, 0.225)

    def __init__(self, weights: str | None = "anyup") -> None:
        super().__init__()
        self.image_encoder = Encoder(Pointwise(3))
        self.key_encoder = Encoder(Pointwise(WIDTH))
        self.query_encoder = Encoder(Pointwise(WIDTH))
        self.key_features_encoder = Encoder(Unification())
        self.aggregation = Encoder(Smoothing())
        self.cross_decode = WindowAttention(WIDTH)
        self.rope = Rotation()
        if weights is not None:
            check_weights(weights)
            tensors = official(weights) if weights in OFFICIAL else read(weights)
            check_fit(tensors, self.state_dict(), weights, "AnyUp")
            self.load_state_dict(tensors)
        self.eval().requires_grad_(False)

    def identity(self) -> dict[str, str]:
        """What upsampled maps depend on."""
        return {"name": "AnyUp", "weights": tensors_digest(self.state_dict())}

    def normalize(self, pixels: Tensor) -> Tensor:
        """Turn pixels (..., 3, H, W) in [0, 1] into the guide."""
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels - mean) / std).to(self.rope.freqs.dtype)

    @torch.no_grad()
    def forward(self, images: Tensor, maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Maps (B, C, H', W') from maps (B, C, h, w) of any kind, features or scores.

        Args:
            images: (B, 3, H, W), normalised with `mean` and `std`.
            maps: Averages of these are all that the result holds.
            size: H' and W'; None takes the image's.
        """
        results = []
        for image, values in zip(images, maps, strict=True):
            queries, keys = self.encode(image, values, size)
            results.append(torch.cat(list(self.cross_decode.rows(queries, keys, values)), dim=1))
        return torch.stack(results)

    @torch.no_grad()
    def encode(self, image: Tensor, maps: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Queries (128, H', W') and keys (128, h, w) of one image, for `cross_decode.rows`."""
        grid = (maps.shape[-2], maps.shape[-1])
        encoded = self.rope(self.image_encoder(image))
        keys = F.adaptive_avg_pool2d(self.key_encoder(encoded), grid)
        keys = torch.cat([keys, self.key_features_encoder(F.normalize(maps.to(encoded.dtype), dim=0))])
        queries = self.query_encoder(encoded)
        if size is not None and size != tuple(image.shape[-2:]):
            queries = F.adaptive_avg_pool2d(queries, size)
        return queries, self.aggregation(keys)


def official(name: str) -> dict[str, Tensor]:
    """One of the two official files, from torch's cache or downloaded.

    Raises:
        WeightsError: It is not there and cannot be fetched.
    """
    url = OFFICIAL[name]
    try:
        return dict(torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True))
    except (URLError, OSError) as error:
        raise WeightsError(
            f"The weights of {name} cannot be fetched from {url} ({error}). Fetch the file elsewhere and give its path."
        ) from error


def check_weights(weights: str) -> None:
    """Raise UserError if a name is neither one of the official weights nor a file."""
    if weights not in OFFICIAL and not Path(weights).is_file():
        raise UserError(
            f"upsampler: {weights!r} is no file. {nearest(weights, [BILINEAR, *OFFICIAL])}Allowed are {BILINEAR}, "
            f"{', '.join(OFFICIAL)}, and the path of a weight file of AnyUp."
        )


class Encoder(nn.Sequential):
    """A first layer and two residual blocks, (c, H, W) -> (128, H, W)."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__(first, Residual(), Residual())


class Pointwise(nn.Conv2d):
    """A convolution of 1 x 1, (c, H, W) -> (128, H, W), a piece of the image at a time."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result = x.new_empty(WIDTH, *x.shape[1:])
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
