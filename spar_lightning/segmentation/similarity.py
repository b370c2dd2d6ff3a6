"""Similarities for a segmentation map, from a single pass or from windows stitched per pixel.

Single-pass inference computes similarities on the patch grid. Sliding-window inference upsamples the similarities of
each window to pixels, sums them on a canvas with the weights of the windows, and divides by the sum of the weights over
each pixel (with equal weights: the teacher's rows of Table 1 in the paper). The canvas has as many rows as a window and
moves down with the windows: it yields each row after the last window that covers it.

Refinement works on the patch grid. There, the features of windows are stitched as for distillation.

Shapes: Q names, H x W pixels of the network's input, P pixels per patch side, d channels; a window has k x l pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.refinement import AnyUp
from spar_lightning.refinement.base import BAND, Refinement
from spar_lightning.segmentation.label_map import SimilarityMaps, StoredMaps
from spar_lightning.sliding_window import (
    SlidingWindow,
    interpolation_matrix,
    window_starts,
    window_weights,
)

CANVAS: Final = 160 * 2**20  # maximum number of values on a canvas (640 MiB in fp32)


class PatchSimilarities:
    """Similarities on the patch grid, from dense features.

    Args:
        features: Function that returns the features as consecutive rows (n, w, d), not normalized; called for each
            call of `rows`.
        size: Height h and width w of the grid.
        embeddings: Unit vectors of all names (Q, d).
    """

    def __init__(self, features: Callable[[], Iterable[Tensor]], size: tuple[int, int], embeddings: Tensor) -> None:
        self._features, self._embeddings = features, embeddings
        self.size = size
        self.names_at_once = len(embeddings)

    def rows(self, names: Tensor) -> Iterator[Tensor]:
        """Yield the similarities (q, n, w) of the names with indices `names`, n rows of patches at a time."""
        for features in self._features():
            embeddings = self._embeddings.to(features.device)[names].to(_precision(features))
            for part in features.split(max(1, BAND // (len(names) * self.size[1]))):
                yield _cosines(_unit(part), embeddings)


class WindowSimilarities:
    """Similarities at the pixels of the network's input, averaged over all windows that cover a pixel.

    Args:
        windows: Sliding window over the backbone.
        image: Normalized image (3, H, W); its sides are multiples of the patch size.
        embeddings: Unit vectors of all names (Q, d).

    Attributes:
        names_at_once: Number of names that fit on the canvas. For more names, all windows are computed again.
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
        """Yield the similarities (q, n, W) of the names with indices `names`, n rows of pixels at a time."""
        height, width = self.size
        canvas: Tensor | None = None  # row y of the image is in row y % k
        done = 0
        for i, parts in groupby(self._windows.maps(self._image), key=lambda part: part[0]):
            strip = self._strip(parts, names)
            if canvas is None:
                canvas = strip.new_zeros(len(names), self._sides[0], width)
                up_y = self._up(0).to(strip)
                totals = [total.to(strip) for total in self._totals()]
            yield from self._take(canvas, totals, done, self._tops[i])
            done = self._tops[i]
            self._add(canvas, strip, up_y, done)
        assert canvas is not None
        yield from self._take(canvas, totals, done, height)

    def _strip(self, parts: Iterable[tuple[int, list[int], Tensor]], names: Tensor) -> Tensor:
        """Upsample one row of windows to pixels along x only, and sum them: (q, k/P, W)."""
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
        """Return the matrix from the patches of a window to its weighted pixels along y (0) or x (1)."""
        side = self._sides[axis]
        return interpolation_matrix(side // self._windows.backbone.patch_size, side) * self._weights(axis)[:, None]

    def _weights(self, axis: int) -> Tensor:
        """Return the weights of the pixels of a window along y (0) or x (1)."""
        return window_weights(self._sides[axis], self._windows.blend)

    def _totals(self) -> list[Tensor]:
        """Add up the weights of all windows over each row (H) and over each column (W) of pixels."""
        totals = []
        for axis, starts in enumerate((self._tops, self._lefts)):
            total, weights = torch.zeros(self.size[axis], dtype=torch.float64), self._weights(axis)
            for start in starts:
                total[start : start + len(weights)] += weights
            totals.append(total)
        return totals

    def _add(self, canvas: Tensor, strip: Tensor, up_y: Tensor, top: int) -> None:
        """Upsample a row of windows (q, k/P, W) along y and add it to the canvas, a few names at a time."""
        step = max(1, BAND // canvas[0].numel())
        turn = top % canvas.shape[1]
        for part, rows in zip(canvas.split(step), strip.split(step), strict=True):
            with torch.autocast(canvas.device.type, enabled=False):
                pixels = torch.einsum("yk,qkx->qyx", up_y, rows)
            part[:, turn:] += pixels[:, : canvas.shape[1] - turn]
            part[:, :turn] += pixels[:, canvas.shape[1] - turn :]

    def _take(self, canvas: Tensor, totals: list[Tensor], start: int, stop: int) -> Iterator[Tensor]:
        """Yield the averages of the rows start..stop-1 and clear these rows of the canvas."""
        step = max(1, BAND // canvas[:, 0].numel())
        for first in range(start, stop, step):
            rows = torch.arange(first, min(stop, first + step), device=canvas.device)
            places = rows % canvas.shape[1]
            yield canvas[:, places] / (totals[0][rows, None] * totals[1])
            canvas[:, places] = 0


class GuidedMaps:
    """Maps on the patch grid, upsampled to the pixels of an image one band of rows at a time.

    Args:
        upsampler: Upsampler on the device of the maps.
        image: Guide image (3, H, W), normalized for the upsampler.
        maps: Maps of all names (Q, h, w).
    """

    def __init__(self, upsampler: AnyUp, image: Tensor, maps: Tensor) -> None:
        self._attention, self._maps = upsampler.cross_decode, maps
        self._queries, self._keys = upsampler.encode(image, maps)
        self.size = (image.shape[-2], image.shape[-1])
        self.names_at_once = len(maps)

    def rows(self, names: Tensor) -> Iterator[Tensor]:
        """Yield the maps (q, n, W) of the names with indices `names`, n rows of pixels at a time."""
        yield from self._attention.rows(self._queries, self._keys, self._maps[names])


def patch_similarities(
    features: Tensor, embeddings: Tensor, refine: Refinement | None, patch_size: int
) -> SimilarityMaps:
    """Return the source of the similarities on the patch grid, for features (h, w, d) and names (Q, d)."""
    if refine is None:
        return PatchSimilarities(lambda: [features], (features.shape[0], features.shape[1]), embeddings)
    return StoredMaps(refined_similarities(features, embeddings, refine, patch_size))


def refined_similarities(features: Tensor, embeddings: Tensor, refine: Refinement | None, patch_size: int) -> Tensor:
    """Compute similarities (Q, h, w) on the patch grid, and refine them.

    Args:
        features: Features (h, w, d) of an image, not normalized.
        embeddings: Unit vectors of all names (Q, d).
        refine: Refinement; None keeps the similarities unchanged.
        patch_size: Side of a patch in pixels.
    """
    unit = _unit(features)
    maps = _cosines(unit, embeddings.to(unit))
    return maps if refine is None else refine(unit, maps, patch_size)


def _unit(features: Tensor) -> Tensor:
    """Normalize features (h, w, d) to unit vectors, in fp32 or higher precision."""
    return F.normalize(features.to(_precision(features)), dim=-1)


def _precision(features: Tensor) -> torch.dtype:
    """Return fp32, or the precision of the features if it is higher."""
    return torch.promote_types(features.dtype, torch.float32)


def _cosines(unit: Tensor, embeddings: Tensor) -> Tensor:
    """Compute the similarities (q, h, w) of unit vectors (h, w, d) and names (q, d)."""
    with torch.autocast(unit.device.type, enabled=False):  # bf16 cannot separate close classes
        return torch.einsum("hwd,qd->qhw", unit, embeddings)
