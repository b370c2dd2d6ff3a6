"""Cosines of class names to a label map, in bands of rows: memory is bounded whatever the image and the classes.

Whoever has the cosines gives them on a grid of its own, from top to bottom; here they are brought to the
size of the label map (bilinear) and decided. Softmax keeps the order of the names, so it is computed only
where a threshold of probability asks for it, and the best name's owner is the class of the largest name.

Shapes: Q names, C classes, H x W pixels of the label map, h x w cells of the source's grid.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from spar_lightning.errors import UserError
from spar_lightning.refinement.base import BAND

KEEP: Final = 96 * 2**20  # cosines that are kept for a second look rather than computed twice (384 MiB in fp32)


class NotFiniteError(UserError):
    """Features are not numbers that can be compared."""


@dataclass(frozen=True)
class Thresholds:
    """When a pixel becomes background, class 0.

    Attributes:
        logit_scale: Factor of the cosines before the softmax over names; it counts for `probability` alone.
        probability: Pixels whose best name is less probable become background; 0 turns it off.
        area: Foreground classes that hold at most this share of the foreground's pixels are given up; null
            turns it off.

    Raises:
        UserError: A number is outside its range.
    """

    logit_scale: float = 40.0
    probability: float = 0.0
    area: float | None = None

    def __post_init__(self) -> None:
        if not self.logit_scale > 0 or not 0 <= self.probability < 1 or not 0 <= (self.area or 0) < 1:
            raise UserError(
                f"thresholds: logit_scale must be above 0, probability and area from 0 to below 1, but got {self}."
            )


class SimilarityMaps(Protocol):
    """Cosines of names on a grid of h x w cells.

    Attributes:
        size: Height h and width w of the grid.
        names_at_once: Most names that `rows` takes.
    """

    size: tuple[int, int]
    names_at_once: int

    def rows(self, names: Tensor) -> Iterator[Tensor]:
        """Cosines (q, n, w) of the names with these numbers (q), n rows at a time, from top to bottom."""
        ...


def label_map(maps: SimilarityMaps, owner: Tensor, size: tuple[int, int], thresholds: Thresholds) -> Tensor:
    """Class of every pixel (H, W) int64.

    Args:
        maps: Cosines of all names.
        owner: Class of each name (Q).
        size: Height H and width W in pixels.
        thresholds: What becomes background; the others leave no trace in the result.
    """
    names = torch.arange(len(owner), device=owner.device)
    if thresholds.area is not None and len(names) * maps.size[0] * maps.size[1] <= KEEP:
        maps = stored_maps(maps, names)
    scale = thresholds.logit_scale if thresholds.probability else None
    best, labels, total = _decide(maps, owner, names, size, scale)
    if thresholds.area is not None:
        pixels = labels.flatten().bincount(minlength=int(owner.max()) + 1)
        given_up = pixels <= thresholds.area * pixels[1:].sum()
        given_up[0] = False
        best, labels, _ = _decide(maps, owner, names[~given_up[owner]], size, None)
    if scale is not None:
        probability = (scale * best - total).exp()
        labels[probability < thresholds.probability] = 0
    return labels


def score_map(maps: SimilarityMaps, owner: Tensor, size: tuple[int, int]) -> Tensor:
    """Score of every class in every pixel (C, H, W) fp32: the largest cosine of its names.

    Args:
        maps: Cosines of all names.
        owner: Class of each name (Q), each class with at least one.
        size: Height H and width W in pixels.
    """
    scores = torch.full((int(owner.max()) + 1, *size), -torch.inf, device=owner.device)
    names = torch.arange(len(owner), device=owner.device)
    for chunk in names.split(min(maps.names_at_once, max(1, BAND // size[1]))):
        for rows, cosines in bands(maps.rows(chunk), maps.size, size):
            index = owner[chunk][:, None, None].expand_as(cosines)
            scores[:, rows] = scores[:, rows].scatter_reduce(0, index, cosines.float(), "amax")
    return scores


def _decide(
    maps: SimilarityMaps, owner: Tensor, names: Tensor, size: tuple[int, int], scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of these names in every pixel: its cosine, its class, and log sum exp(scale * cosine) of all."""
    best = torch.full(size, -torch.inf, device=owner.device)
    labels = torch.zeros(size, dtype=torch.long, device=owner.device)
    total = torch.full(size if scale is not None else (), -torch.inf, device=owner.device)
    step = min(maps.names_at_once, max(1, BAND // size[1]))
    for chunk in names.split(step):
        for rows, cosines in bands(maps.rows(chunk), maps.size, size):
            best, total = best.to(cosines), total.to(cosines)
            highest, which = cosines.max(0)  # (n, W)
            better = highest > best[rows]
            best[rows] = torch.where(better, highest, best[rows])
            labels[rows] = torch.where(better, owner[chunk[which]], labels[rows])
            if scale is not None:
                total[rows] = torch.logaddexp(total[rows], (scale * cosines).logsumexp(0))
    if not best.isfinite().all():
        raise NotFiniteError(
            "The features of an image hold NaN or infinity. Evaluate in --precision 32-true, or look for the step at "
            "which the loss of this network ceased to be finite."
        )
    return best, labels, total


def bands(pieces: Iterable[Tensor], source: tuple[int, int], target: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Resize maps that come in pieces (q, n, w): bilinear, align_corners False, a band of target rows at a time.

    Yields the rows of the target and their values (q, rows, W).
    """
    position = ((torch.arange(target[0], dtype=torch.float64) + 0.5) * source[0] / target[0] - 0.5).clamp(min=0)
    lower = position.long()
    upper = (lower + 1).clamp(max=source[0] - 1)
    held: Tensor | None = None  # source rows from `first` on
    first = done = 0
    for piece in pieces:
        if held is None:  # where the rows are; which bands are ready is decided on the CPU
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
    """Maps of all names in memory.

    Args:
        maps: (Q, h, w).
    """

    def __init__(self, maps: Tensor) -> None:
        self._maps = maps
        self.size = (maps.shape[1], maps.shape[2])
        self.names_at_once = len(maps)

    def rows(self, names: Tensor) -> Iterator[Tensor]:
        """Maps (q, n, w), n rows at a time."""
        for part in self._maps.split(max(1, BAND // (len(names) * self.size[1])), dim=1):
            yield part[names]


def stored_maps(maps: SimilarityMaps, names: Tensor) -> StoredMaps:
    """The maps in memory, all rows of all names: for a second look."""
    whole = torch.empty(0)
    for chunk in names.split(maps.names_at_once):
        row = 0
        for part in maps.rows(chunk):
            if not whole.numel():  # filled in place: a second copy would be as large
                whole = part.new_empty(len(names), *maps.size)
            whole[chunk, row : row + part.shape[1]] = part
            row += part.shape[1]
    return StoredMaps(whole)
