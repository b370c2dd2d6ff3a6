"""Where the cosines of a label map come from: one pass over the image, or windows stitched pixel by pixel.

What refines them works on the patch grid, where the features of windows are stitched as those of the distillation.

Single pass gives them on the patch grid. The sliding window brings every window's cosines to pixels,
sums them on a canvas and divides by the number of windows over each pixel (the teacher's rows of the
paper's Table 1). That canvas has as many rows as a window and moves down with the windows: rows that no
later window covers are handed on.

Shapes: Q names, H x W pixels of the network's image, d channels; a window has k x l pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.refinement import AnyUp
from spar_lightning.refinement.base import BAND, Refinement
from spar_lightning.segmentation.label_map import SimilarityMaps, StoredMaps
from spar_lightning.sliding_window import DenseEncoder, SlidingWindow, interpolation_matrix, window_starts

CANVAS: Final = 160 * 2**20  # numbers on a canvas at most (640 MiB in fp32)


class PatchSimilarities:
    """Cosines on the patch grid, from one pass of the backbone.

    Args:
        backbone: The network.
        image: Normalised image (3, H, W), sides multiples of the patch.
        embeddings: Unit vectors of all names (Q, d).
    """

    def __init__(self, backbone: DenseEncoder, image: Tensor, embeddings: Tensor) -> None:
        self._unit = _unit(backbone(image[None])[0])  # (h, w, d)
        self._embeddings = embeddings.to(self._unit)
        self.size = (self._unit.shape[0], self._unit.shape[1])
        self.names_at_once = len(embeddings)

    def rows(self, names: Tensor) -> Iterator[Tensor]:
        """Cosines (q, n, w), n rows of patches at a time."""
        for part in self._unit.split(max(1, BAND // (len(names) * self.size[1]))):
            yield _cosines(part, self._embeddings[names])


class WindowSimilarities:
    """Cosines at the pixels of the network's image, averaged over all windows that see them.

    Args:
        windows: The network in sliding windows.
        image: Normalised image (3, H, W), sides multiples of the patch.
        embeddings: Unit vectors of all names (Q, d).

    Attributes:
        names_at_once: What the canvas holds; for more names the network sees all windows again.
    """

    def __init__(self, windows: SlidingWindow, image: Tensor, embeddings: Tensor) -> None:
        self._windows, self._image, self._embeddings = windows, image, embeddings
        height, width = image.shape[-2:]
        self.size = (height, width)
        self._sides = (min(windows.window, height), min(windows.window, width))  # k, l
        self._tops = window_starts(height, windows.window, windows.stride)
        self._lefts = window_starts(width, windows.window, windows.stride)
        self.names_at_once = max(1, CANVAS // (self._sides[0] * width))

    def rows(self, names: Tensor) -> Iterator[Tensor]:
        """Cosines (q, n, W), n rows of pixels at a time."""
        height, width = self.size
        canvas: Tensor | None = None  # row y of the image lies in row y % k
        done = 0
        for i, parts in groupby(self._windows.maps(self._image), key=lambda part: part[0]):
            strip = self._strip(parts, names)
            if canvas is None:
                canvas = strip.new_zeros(len(names), self._sides[0], width)
                up_y = self._up(0).to(strip)
                counts = [count.to(strip) for count in self._counts()]
            yield from self._take(canvas, counts, done, self._tops[i])
            done = self._tops[i]
            self._add(canvas, strip, up_y, done)
        assert canvas is not None
        yield from self._take(canvas, counts, done, height)

    def _strip(self, parts: Iterable[tuple[int, list[int], Tensor]], names: Tensor) -> Tensor:
        """A row of windows, brought to pixels and summed along x alone: (q, k/P, W)."""
        strip: Tensor | None = None
        for _, columns, part in parts:
            if strip is None:
                up_x, embeddings = self._up(1).to(part), self._embeddings.to(part)[names]
                strip = part.new_zeros(len(names), part.shape[1], self.size[1])
            for j, features in zip(columns, part, strict=True):
                with torch.autocast(part.device.type, enabled=False):
                    across = torch.einsum("qkl,xl->qkx", _cosines(_unit(features), embeddings), up_x)
                strip[:, :, self._lefts[j] : self._lefts[j] + self._sides[1]] += across
        assert strip is not None
        return strip

    def _up(self, axis: int) -> Tensor:
        """From the patches of a window to its pixels along y (0) or x (1), a matrix."""
        side = self._sides[axis]
        return interpolation_matrix(side // self._windows.backbone.patch_size, side)

    def _counts(self) -> list[Tensor]:
        """Windows over each row (H) and over each column (W) of pixels."""
        counts = []
        for starts, side, length in zip((self._tops, self._lefts), self._sides, self.size, strict=True):
            count = torch.zeros(length)
            for start in starts:
                count[start : start + side] += 1
            counts.append(count)
        return counts

    def _add(self, canvas: Tensor, strip: Tensor, up_y: Tensor, top: int) -> None:
        """Bring a row of windows (q, k/P, W) to pixels and add it to the canvas; a few names at a time."""
        step = max(1, BAND // canvas[0].numel())
        turn = top % canvas.shape[1]
        for part, rows in zip(canvas.split(step), strip.split(step), strict=True):
            with torch.autocast(canvas.device.type, enabled=False):
                pixels = torch.einsum("yk,qkx->qyx", up_y, rows)
            part[:, turn:] += pixels[:, : canvas.shape[1] - turn]
            part[:, :turn] += pixels[:, canvas.shape[1] - turn :]

    def _take(self, canvas: Tensor, counts: list[Tensor], start: int, stop: int) -> Iterator[Tensor]:
        """Averages of the rows start..stop-1, whose places on the canvas become free."""
        step = max(1, BAND // canvas[:, 0].numel())
        for first in range(start, stop, step):
            rows = torch.arange(first, min(stop, first + step), device=canvas.device)
            places = rows % canvas.shape[1]
            yield canvas[:, places] / (counts[0][rows, None] * counts[1])
            canvas[:, places] = 0


class GuidedMaps:
    """Maps on the patch grid, brought to the pixels of an image, a band of rows at a time.

    Args:
        upsampler: On the device of the maps.
        image: The guide (3, H, W), normalised for the upsampler.
        maps: Maps of all names (Q, h, w).
    """

    def __init__(self, upsampler: AnyUp, image: Tensor, maps: Tensor) -> None:
        self._attention, self._maps = upsampler.cross_decode, maps
        self._queries, self._keys = upsampler.encode(image, maps)
        self.size = (image.shape[-2], image.shape[-1])
        self.names_at_once = len(maps)

    def rows(self, names: Tensor) -> Iterator[Tensor]:
        """Maps (q, n, W), n rows of pixels at a time."""
        yield from self._attention.rows(self._queries, self._keys, self._maps[names])


def refined_similarities(
    encoder: Callable[[Tensor], Tensor],
    backbone: Backbone,
    refine: Refinement | None,
    upsampler: AnyUp | None,
    image: Tensor,
    embeddings: Tensor,
) -> SimilarityMaps:
    """Compute similarities on the patch grid, refine them, and upsample them to the network's image, guided by it.

    Args:
        encoder: Normalised images (B, 3, H, W) to features (B, h, w, d): the network, or its sliding window.
        backbone: The network.
        refine: None leaves the cosines as they are.
        upsampler: None leaves them on the patch grid.
        image: Normalised image (3, H, W), sides multiples of the patch.
        embeddings: Unit vectors of all names (Q, d).
    """
    unit = _unit(encoder(image[None])[0])  # (h, w, d)
    maps = _cosines(unit, embeddings.to(unit))
    if refine is not None:
        maps = refine(unit, maps, backbone.patch_size)
    if upsampler is None:
        return StoredMaps(maps)
    return GuidedMaps(upsampler, upsampler.normalize(backbone.denormalize(image)), maps)


def _unit(features: Tensor) -> Tensor:
    """Features (h, w, d) as unit vectors, at least fp32."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _cosines(unit: Tensor, embeddings: Tensor) -> Tensor:
    """Cosines (q, h, w) of unit vectors (h, w, d) with names (q, d)."""
    with torch.autocast(unit.device.type, enabled=False):  # close classes differ by less than bf16 holds
        return torch.einsum("hwd,qd->qhw", unit, embeddings)
