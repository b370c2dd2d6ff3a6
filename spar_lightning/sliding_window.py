"""Sliding-window inference: a backbone on overlapping windows, stitched on the patch grid of the image.

These are the numerics of the teacher (paper, section 3). If the stride s is not a multiple of the patch size
P, windows start between patches. Each window's feature map is then upsampled by r = P / gcd(P, s) (bilinear),
the maps are averaged where they overlap, with equal weights or more weight near the center of a window, and
the average is resized to the patch grid (bilinear). All these steps, including the overlap counts, are linear
and separable in y and x. The contribution of a window is therefore A_y map A_x^T with two small matrices, and
the upsampled canvas is never allocated.

Shapes: B images, H x W pixels, h x w patches, windows of k x l pixels, d channels.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Final, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar_lightning.errors import UserError
from spar_lightning.image.resize import check_sides

ALGORITHM = 1  # increase if the same backbone, window and stride give different features
# Patches per forward pass. More would exceed the caches of a CPU; a GPU needs matrices with this many rows.
PATCHES_ON_CPU: Final = 4096
PATCHES_ELSEWHERE: Final = 65536


Blend = Literal["mean", "hann"]


class DenseEncoder(Protocol):
    """Encoder of the windows: normalized images (B, 3, H, W) to features (B, h, w, d).

    H and W are multiples of the patch size.
    """

    patch_size: int
    window: int

    def __call__(self, images: Tensor, /) -> Tensor: ...


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the starts of the windows along one axis in pixels: 0, s, 2s, ..., length - window.

    A window that is longer than the axis starts at 0.
    """
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def window_weights(side: int, blend: Blend) -> Tensor:
    """Return the float64 weights (side,) of the positions of a window along one axis.

    `mean` gives equal weights. `hann` is the Hann window sin²: most weight at the center, above 0 at the borders.
    """
    if blend == "mean":
        return torch.ones(side, dtype=torch.float64)
    return torch.sin(math.pi * (torch.arange(side, dtype=torch.float64) + 0.5) / side) ** 2


def stitch_matrices(length: int, window: int, stride: int, patch: int, blend: Blend = "mean") -> Tensor:
    """Return float64 matrices (n, length/P, window/P) that map each of n windows to the patches of one axis.

    All arguments are in pixels. The window is clamped to the axis. Each row sums to 1 over all windows, so
    constant features are preserved.
    """
    window = min(window, length)
    r = patch // math.gcd(patch, stride)
    fine, k = length // patch * r, window // patch
    up = interpolation_matrix(k, k * r) * window_weights(k * r, blend)[:, None]
    starts = [start * r // patch for start in window_starts(length, window, stride)]
    placed = torch.zeros(len(starts), fine, k, dtype=torch.float64)
    for matrix, start in zip(placed, starts, strict=True):
        matrix[start : start + k * r] = up
    total = placed.sum(dim=(0, 2))  # weights per upsampled position, because rows of a bilinear matrix sum to 1
    return interpolation_matrix(fine, fine // r) @ (placed / total[:, None])


def interpolation_matrix(source: int, target: int) -> Tensor:
    """Return bilinear interpolation (align_corners=False) along one axis as a matrix (target, source)."""
    basis = torch.eye(source, dtype=torch.float64)[None]
    return F.interpolate(basis, target, mode="linear", align_corners=False)[0].T


class SlidingWindow(nn.Module):
    """Sliding-window inference: dense features of an image of any size from windows of a fixed size.

    Args:
        backbone: Encoder that is applied to the windows.
        stride: Step between windows in pixels. It does not have to be a multiple of the patch size.
        window: Side of a window in pixels, a multiple of the patch size; null uses the native size of the backbone.
        batch_size: Number of windows per forward pass; null selects it by device.
        blend: Weights of overlapping windows (see `window_weights`).

    Raises:
        UserError: An argument is out of range, or the stride is larger than the window.
    """

    def __init__(
        self,
        backbone: DenseEncoder,
        stride: int = 24,
        window: int | None = None,
        batch_size: int | None = None,
        blend: Blend = "mean",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.stride = stride
        self.window = backbone.window if window is None else window
        self.batch_size, self.blend = batch_size, blend
        if stride < 1 or (batch_size is not None and batch_size < 1):
            raise UserError(f"stride and batch_size must be at least 1, but got {stride} and {batch_size}.")
        if self.window < 1 or self.window % backbone.patch_size:
            raise UserError(
                f"window must be a positive multiple of the patch size {backbone.patch_size}, but got {self.window}."
            )
        if stride > self.window:
            raise UserError(
                f"stride {stride} is larger than the window of {self.window} pixels: patches between windows would "
                f"have no features. Use a stride from 1 to {self.window}."
            )

    def identity(self) -> dict[str, Any]:
        """Return the cache key of the stitched features without the backbone; batch_size does not affect them."""
        blend = {} if self.blend == "mean" else {"blend": self.blend}
        return {"window": self.window, "stride": self.stride, **blend, "algorithm": ALGORITHM}

    def description(self) -> str:
        """Return window and stride as text."""
        blend = "" if self.blend == "mean" else f", {self.blend} weights"
        return f"windows of {self.window} px, stride {self.stride} px{blend}"

    def count(self, height: int, width: int) -> int:
        """Return the number of windows of an image; height and width are in pixels."""
        rows, columns = (len(window_starts(side, self.window, self.stride)) for side in (height, width))
        return rows * columns

    def windows_at_once(self, device: torch.device) -> int:
        """Return the number of windows per forward pass on a device."""
        if self.batch_size is not None:
            return self.batch_size
        patches = PATCHES_ON_CPU if device.type == "cpu" else PATCHES_ELSEWHERE
        return max(1, patches // (self.window // self.backbone.patch_size) ** 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, h, w, d) of normalized images (B, 3, H, W), accumulated in fp32 or higher precision."""
        check_sides(images, self.backbone.patch_size)
        return torch.stack([self._stitch(image) for image in images])

    def maps(self, image: Tensor) -> Iterator[tuple[int, list[int], Tensor]]:
        """Yield the feature maps of all windows of a normalized image (3, H, W), row by row.

        A row of windows can be split into several parts, because a forward pass batches windows across rows.

        Yields:
            Row index, column indices, and maps (n, k/P, l/P, d) in fp32 or higher precision.
        """
        height, width = image.shape[-2:]
        k, l = min(self.window, height), min(self.window, width)
        tops = window_starts(height, self.window, self.stride)
        lefts = window_starts(width, self.window, self.stride)
        places = [(i, j) for i in range(len(tops)) for j in range(len(lefts))]
        step = self.windows_at_once(image.device)
        for first in range(0, len(places), step):
            batch = places[first : first + step]
            # Slices are views of the image: only the current batch of windows is copied.
            windows = torch.stack([image[:, tops[i] : tops[i] + k, lefts[j] : lefts[j] + l] for i, j in batch])
            maps = self.backbone(windows)
            maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # (n, k/P, l/P, d)
            done = 0
            for i, row in groupby(batch, key=lambda place: place[0]):
                columns = [j for _, j in row]
                yield i, columns, maps[done : done + len(columns)]
                done += len(columns)

    def rows(
        self,
        bands: Iterable[Tensor],
        size: tuple[int, int],
        first: int = 0,
        last: int | None = None,
        prepare: Callable[[Tensor], Tensor] = lambda windows: windows,
    ) -> Iterator[Tensor]:
        """Yield the features of `forward` for one image, which is read once from top to bottom.

        Only the pixels under one row of windows are in memory, and the features of the patches that this row covers.

        Args:
            bands: Consecutive rows (3, n, W) of the image.
            size: Height H and width W of the image in pixels.
            first: First row of patches to compute.
            last: Row of patches after the last one to compute; None computes all rows from `first`.
            prepare: Function that normalizes windows (n, 3, k, l), if the bands are not normalized.

        Yields:
            Consecutive rows of features (n, w, d), in fp32 or higher precision.
        """
        patch = self.backbone.patch_size
        last = size[0] // patch if last is None else last
        tops, lefts = (window_starts(side, self.window, self.stride) for side in size)
        a_y, a_x = (stitch_matrices(side, self.window, self.stride, patch, self.blend) for side in size)
        columns = [_touched(matrix) for matrix in a_x]
        k, l = (min(self.window, side) for side in size)
        step: int | None = None
        unfinished: Tensor | None = None  # sums of the rows of features from row `first` on
        for i, strip in enumerate(_strips(bands, tops, k)):
            rows = _touched(a_y[i])
            if rows.stop <= first:
                continue
            if rows.start >= last:
                break
            rows = slice(max(rows.start, first), min(rows.stop, last))
            if unfinished is not None and rows.start > first:  # windows below do not cover the rows above
                yield unfinished[: rows.start - first]
                unfinished, first = unfinished[rows.start - first :].clone(), rows.start
            sums: Tensor | None = None
            step = step or self.windows_at_once(strip.device)
            for part in range(0, len(lefts), step):
                batch = range(part, min(part + step, len(lefts)))
                maps = self.backbone(prepare(torch.stack([strip[..., lefts[j] : lefts[j] + l] for j in batch])))
                maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # (n, k/P, l/P, d)
                if sums is None:
                    sums = maps.new_zeros(rows.stop - first, a_x.shape[1], maps.shape[-1])
                    if unfinished is not None:
                        sums[: len(unfinished)] = unfinished
                for j, features in zip(batch, maps, strict=True):
                    with torch.autocast(maps.device.type, enabled=False):  # autocast would round the matrices
                        across = torch.einsum("xl,kld->kxd", a_x[j, columns[j]].to(maps), features)
                        sums[:, columns[j]] += torch.einsum("yk,kxd->yxd", a_y[i, rows].to(maps), across)
            unfinished = sums
        assert unfinished is not None
        yield unfinished

    def _stitch(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        patch = self.backbone.patch_size
        a_y = stitch_matrices(height, self.window, self.stride, patch, self.blend)  # (rows, h, k/P)
        a_x = stitch_matrices(width, self.window, self.stride, patch, self.blend)  # (columns, w, l/P)
        total: Tensor | None = None
        for i, columns, part in self.maps(image):
            if total is None:
                a_y, a_x = a_y.to(part), a_x.to(part)
                total = part.new_zeros(height // patch, width // patch, part.shape[-1])
            # A list of indices would be copied to the accelerator first, and the host would wait for the copy.
            places = slice(columns[0], columns[-1] + 1)
            with torch.autocast(part.device.type, enabled=False):  # autocast would round the matrices
                strip = torch.einsum("nxl,nkld->kxd", a_x[places], part)  # one row of windows, stitched along x
                total += torch.einsum("yk,kxd->yxd", a_y[i], strip)
        assert total is not None
        return total


def _touched(matrix: Tensor) -> slice:
    """Return the rows of a matrix from the first to the last one that is not zero."""
    rows = matrix.any(dim=1).nonzero().flatten()
    return slice(int(rows[0]), int(rows[-1]) + 1)


def _strips(bands: Iterable[Tensor], starts: Sequence[int], side: int) -> Iterator[Tensor]:
    """Cut an image that comes in bands of rows (3, n, W) into overlapping strips (3, side, W)."""
    remaining, held, top = iter(bands), None, 0
    for start in starts:
        parts: list[Tensor] = [] if held is None else [held[:, start - top :]]
        while sum(part.shape[1] for part in parts) < side:
            parts.append(next(remaining))
        held = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        top = start
        yield held[:, :side]


class SinglePass(SlidingWindow):
    """Single pass over the whole image, in place of a sliding window.

    Args:
        backbone: Encoder that is applied to the image.
    """

    def __init__(self, backbone: DenseEncoder) -> None:
        super().__init__(backbone, stride=backbone.window)

    def identity(self) -> dict[str, Any]:
        return {"inference": "single"}

    def description(self) -> str:
        return "single pass"

    def count(self, height: int, width: int) -> int:
        """Return the number of windows with the area of the image, at least 1."""
        return max(1, round(height * width / self.window**2))

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return features.to(torch.promote_types(features.dtype, torch.float32))
