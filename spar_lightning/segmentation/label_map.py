"""Segmentation maps from the similarities of class names, computed in bands of rows.

The bands bound the memory use for any image size and any number of classes. A source yields the similarities on its
own grid, from top to bottom. They are resized to the segmentation map (bilinear), and each pixel gets the class of the
name with the largest similarity. Softmax preserves the order of the names, so it is computed only for a probability
threshold.

Shapes: Q names, C classes, H x W pixels of the segmentation map, h x w cells of the source's grid.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.errors import UserError
from spar_lightning.refinement.base import BAND

KEEP: Final = 96 * 2**20  # maximum number of similarities stored for a second pass (384 MiB in fp32)


class NotFiniteError(UserError):
    """Error for features that contain NaN or infinity."""


@dataclass(frozen=True)
class Thresholds:
    """Thresholds below which a pixel becomes background (class 0).

    Attributes:
        logit_scale: Factor of the similarities before the softmax over names; only used for `probability`.
        probability: Pixels become background if the probability of their best name is lower; 0 disables it.
        area: Foreground classes with at most this share of the foreground pixels are removed, and their pixels get
            the next best class; null disables it.

    Raises:
        UserError: If a value is out of range.
    """

    logit_scale: float = 40.0
    probability: float = 0.0
    area: float | None = None

    def __post_init__(self) -> None:
        if not self.logit_scale > 0 or not 0 <= self.probability < 1 or not 0 <= (self.area or 0) < 1:
            raise UserError(
                "thresholds: logit_scale must be above 0; probability and area must be at least 0 and below 1. "
                f"Got {self}."
            )


class SimilarityMaps(Protocol):
    """Source of the similarities of names on a grid of h x w cells.

    Attributes:
        size: Height h and width w of the grid.
        names_at_once: Maximum number of names per call of `rows`.
    """

    size: tuple[int, int]
    names_at_once: int

    def rows(self, names: Tensor) -> Iterator[Tensor]:
        """Yield the similarities (q, n, w) of the names with indices `names` (q), n rows at a time from the top."""
        ...


def label_map(
    maps: SimilarityMaps,
    owner: Tensor,
    size: tuple[int, int],
    thresholds: Thresholds,
    dtype: torch.dtype = torch.long,
) -> Tensor:
    """Return the segmentation map (H, W): the class index of each pixel.

    Args:
        maps: Similarities of all names.
        owner: Class index of each name (Q).
        size: Height H and width W in pixels.
        thresholds: Background thresholds; disabled ones do not affect the result.
        dtype: Integer type of the result.

    Raises:
        NotFiniteError: If the similarities contain NaN or infinity.
    """
    names = torch.arange(len(owner), device=owner.device)
    scale = thresholds.logit_scale if thresholds.probability else None
    totals: Tensor | None = None  # logsumexp over all names, if it was computed with other names than the best
    if thresholds.area is not None:
        if len(names) * maps.size[0] * maps.size[1] <= KEEP:
            maps = stored_maps(maps, names)
        pixels = owner.new_zeros(int(owner.max()) + 1)
        for rows, best, classes, total in _decide(maps, owner, names, size, scale):
            pixels += classes.flatten().bincount(minlength=len(pixels))
            if scale is not None:
                totals = best.new_empty(size) if totals is None else totals
                totals[rows] = total
        given_up = pixels <= thresholds.area * pixels[1:].sum()
        given_up[0] = False
        names = names[~given_up[owner]]
    labels = torch.empty(size, dtype=dtype, device=owner.device)
    for rows, best, classes, total in _decide(maps, owner, names, size, scale if totals is None else None):
        if scale is not None:
            probability = (scale * best - (total if totals is None else totals[rows])).exp()
            classes[probability < thresholds.probability] = 0
        labels[rows] = classes.to(dtype)
    return labels


def score_map(maps: SimilarityMaps, owner: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the score of each class at each pixel (C, H, W) in fp32: the largest similarity of its names.

    Args:
        maps: Similarities of all names.
        owner: Class index of each name (Q); each class has at least one name.
        size: Height H and width W in pixels.
    """
    scores = torch.full((int(owner.max()) + 1, *size), -torch.inf, device=owner.device)
    names = torch.arange(len(owner), device=owner.device)
    for chunk in names.split(maps.names_at_once):
        for rows, cosines in bands(maps.rows(chunk), maps.size, size):
            index = owner[chunk][:, None, None].expand_as(cosines)
            scores[:, rows] = scores[:, rows].scatter_reduce(0, index, cosines.float(), "amax")
    return scores


def _decide(
    maps: SimilarityMaps, owner: Tensor, names: Tensor, size: tuple[int, int], scale: float | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield, for bands of rows, the best similarity, its class, and logsumexp(scale * similarity) over `names`.

    If the source has all names at once, only a band is in memory. Otherwise, the best of the names so far is kept for
    the whole map, which is yielded as one band.
    """
    chunks = names.split(maps.names_at_once)
    if len(chunks) == 1:
        for rows, cosines in bands(maps.rows(names), maps.size, size):
            yield rows, *_best(cosines, owner[names], scale)
        return
    best = torch.full(size, -torch.inf, device=owner.device)
    labels = torch.zeros(size, dtype=torch.long, device=owner.device)
    total = torch.full(size if scale is not None else (), -torch.inf, device=owner.device)
    for chunk in chunks:
        for rows, cosines in bands(maps.rows(chunk), maps.size, size):
            best, total = best.to(cosines), total.to(cosines)
            highest, classes, sums = _best(cosines, owner[chunk], scale)
            better = highest > best[rows]
            best[rows] = torch.where(better, highest, best[rows])
            labels[rows] = torch.where(better, classes, labels[rows])
            if scale is not None:
                total[rows] = torch.logaddexp(total[rows], sums)
    yield slice(0, size[0]), best, labels, total


def _best(cosines: Tensor, owner: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best similarity (n, W), its class, and logsumexp(scale * similarity), of similarities (q, n, W)."""
    highest, which = cosines.max(0)
    if not highest.isfinite().all():
        raise NotFiniteError(
            "The features of an image contain NaN or infinity. Evaluate with --precision 32-true, or check whether "
            "training diverged (loss became NaN or inf)."
        )
    return highest, owner[which], highest if scale is None else (scale * cosines).logsumexp(0)


def bands(pieces: Iterable[Tensor], source: tuple[int, int], target: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Resize maps that arrive in pieces of rows, one band of target rows at a time.

    The result equals bilinear `F.interpolate` with align_corners=False.

    Args:
        pieces: Consecutive rows of the maps (q, n, w), from top to bottom.
        source: Height and width of the maps.
        target: Height and width of the result (H, W).

    Yields:
        Slice of target rows, and their values (q, rows, W).
    """
    position = ((torch.arange(target[0], dtype=torch.float64) + 0.5) * source[0] / target[0] - 0.5).clamp(min=0)
    lower = position.long()
    upper = (lower + 1).clamp(max=source[0] - 1)
    held: Tensor | None = None  # source rows, beginning with row `first`
    first = done = 0
    for piece in pieces:
        if held is None:  # indices on the device of the rows; the CPU decides which bands are ready
            above_of, below_of = lower.to(piece.device), upper.to(piece.device)
            share = (position - lower)[:, None].to(piece)
        held = piece if held is None else torch.cat([held, piece], dim=1)
        ready = int((upper < first + held.shape[1]).sum())
        step = max(1, BAND // (held.shape[0] * max(target[1], held.shape[2])))
        for start in range(done, ready, step):
            rows = slice(start, min(ready, start + step))
            above, below = (held[:, taps[rows] - first] for taps in (above_of, below_of))
            between = torch.lerp(above, below, share[rows])
            yield rows, F.interpolate(between[None], (between.shape[1], target[1]), mode="bilinear")[0]
        done = max(done, ready)
        if done < target[0]:
            keep = min(int(lower[done]), first + held.shape[1])
            held, first = held[:, keep - first :], keep
    assert done == target[0]


class StoredMaps:
    """Similarity maps of all names, stored in memory.

    Args:
        maps: Similarity maps (Q, h, w).
    """

    def __init__(self, maps: Tensor) -> None:
        self._maps = maps
        self.size = (maps.shape[1], maps.shape[2])
        self.names_at_once = len(maps)

    def rows(self, names: Tensor) -> Iterator[Tensor]:
        """Yield the maps (q, n, w) of the names with indices `names`, n rows at a time."""
        for part in self._maps.split(max(1, BAND // (len(names) * self.size[1])), dim=1):
            yield part[names]


def stored_maps(maps: SimilarityMaps, names: Tensor) -> StoredMaps:
    """Compute all rows of all names once and store them in memory, to read them several times."""
    whole = torch.empty(0)
    for chunk in names.split(maps.names_at_once):
        row = 0
        for part in maps.rows(chunk):
            if not whole.numel():  # filled in place, to avoid a second copy of this size
                whole = part.new_empty(len(names), *maps.size)
            whole[chunk, row : row + part.shape[1]] = part
            row += part.shape[1]
    return StoredMaps(whole)
