"""Bootstrap over images: confidence intervals of mIoU, and of the difference of two mIoU values.

Images are drawn with replacement, and the mIoU is computed from the sums of their counts. Two networks are compared on
the same draws (paired), and the interval of their difference has the quantiles of the draws (percentile bootstrap;
Efron, 1979). Classes that occur in few images are missing in many draws, which shifts the mIoU of all draws to one
side. In a difference this cancels out; the interval of a single mIoU has the quantiles of the mirrored draws (basic
bootstrap; Davison and Hinkley, 1997). Intervals cover the choice of images only, not that of training seeds, prompts or
class names.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

SAMPLES: Final = 2000  # draws of images
LEVEL: Final = 0.95  # probability that an interval covers the value on all images of the same kind
FEW: Final = 10  # images; a class that is labeled in fewer is rare, and has no interval (docs/evaluation.md)
BLOCK: Final = 2**22  # numbers in a block of draws

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Value in percent or difference in percentage points, and its confidence interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: Counts) -> "Interval | None":
        """Return the interval of a value with these draws; NaN draws are left out, None without any other."""
        draws = draws[np.isfinite(draws)]
        if not len(draws) or not np.isfinite(value):
            return None
        low, high = np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return cls(float(value), float(low), float(high))

    @classmethod
    def of_miou(cls, miou: float, draws: Counts) -> "Interval":
        """Return the interval of an mIoU, from draws that are mirrored at it and limited to 0 to 100."""
        interval = cls.of(miou, (2 * miou - draws).clip(0, 100))
        assert interval is not None
        return interval

    @property
    def differs(self) -> bool:
        """True if the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Differences of two networks on the same images.

    Attributes:
        miou: Difference of the mIoU; None if too many classes are rare.
        per_class: Difference of the IoU of each class; None for a class that is rare or never occurs.
        draws: Difference of the mIoU in each draw (samples), for means of several benchmarks.
    """

    miou: Interval | None
    per_class: list[Interval | None]
    draws: Counts


def dense(per_image: NDArray[np.int64], images: int, classes: int) -> Counts:
    """Return counts (images, C, k), in the order of the image indices.

    Args:
        per_image: Rows of image, class and k counts (n, 2 + k).
        images: Number of images.
        classes: Number of classes C.
    """
    counts = np.zeros((images, classes, per_image.shape[1] - 2))
    counts[per_image[:, 0], per_image[:, 1]] = per_image[:, 2:]
    return counts


def iou(counts: Counts) -> Counts:
    """Return the IoU in percent (..., C) of counts (..., C, 3); NaN for a class that does not occur."""
    hits, labeled, predicted = np.moveaxis(counts, -1, 0)
    union = labeled + predicted - hits
    share: Counts = np.divide(hits, union, out=np.full_like(union, np.nan), where=union > 0)
    return 100 * share


def rare_classes(counts: Counts) -> NDArray[np.bool_]:
    """Return which classes (C) are labeled in 1 to FEW - 1 images.

    Args:
        counts: Counts (images, C, k), of which the second column are labeled pixels.
    """
    images = (counts[..., 1] > 0).sum(0)
    rare: NDArray[np.bool_] = (images > 0) & (images < FEW)
    return rare


def warning(counts: Counts) -> str | None:
    """Return a warning if more than a tenth of the labeled classes are rare, which makes intervals too narrow."""
    rare, classes = int(rare_classes(counts).sum()), int(counts[..., 1].any(0).sum())
    if 10 * rare <= classes:
        return None
    effect = "the intervals are too narrow" if has_interval(counts) else "intervals are left out"
    return f"{rare} of {classes} classes are labeled in fewer than {FEW} images, so {effect}."


def has_interval(counts: Counts) -> bool:
    """Return False if more than half of the classes are rare, or if no class is labeled."""
    rare, classes = int(rare_classes(counts).sum()), int(counts[..., 1].any(0).sum())
    return 2 * rare <= classes and classes > 0


def resampled(counts: Counts, seed: int, samples: int = SAMPLES) -> Counts:
    """Return the IoU in percent (samples, n, C) of each draw of images.

    Args:
        counts: Correct, labeled and predicted pixels (images, n, C, 3) of n networks on the same images.
        seed: Seed of the draws. Equal numbers of images and seeds give the same draws.
        samples: Number of draws.
    """
    images = len(counts)
    rng = np.random.default_rng(seed)
    rows = counts.reshape(images, -1)  # (images, n * C * 3)
    found = []
    block = max(1, BLOCK // max(rows.shape[1], images))
    for start in range(0, samples, block):
        drawn = rng.integers(images, size=(min(block, samples - start), images))
        drawn += images * np.arange(len(drawn))[:, None]
        weights = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)  # how often each image is drawn
        found.append(iou((weights.astype(np.float64) @ rows).reshape(-1, *counts.shape[1:])))
    return np.concatenate(found)


def mean_iou(ious: Counts) -> Counts:
    """Return the mean over classes (..., C) -> (...), without classes that do not occur; NaN if none occurs."""
    occurs = np.isfinite(ious)
    sums, count = np.where(occurs, ious, 0).sum(-1), occurs.sum(-1)
    means: Counts = np.divide(sums, count, out=np.full(sums.shape, np.nan), where=count > 0)
    return means


def miou_draws(counts: Counts, seed: int, samples: int = SAMPLES) -> Counts:
    """Return the mIoU in percent (samples) of each draw, from the counts (images, C, 3) of one network."""
    return mean_iou(resampled(counts[:, None], seed, samples)[:, 0])


def compare(one: Counts, other: Counts, seed: int, samples: int = SAMPLES) -> Comparison:
    """Return the differences `other - one` with confidence intervals.

    Args:
        one: Counts of the first network (images, C, 3).
        other: Counts of the second network on the same images, in the same order.
        seed: Seed of the draws.
        samples: Number of draws of images.
    """
    assert one.shape == other.shape
    both = np.stack([one, other], axis=1)  # (images, 2, C, 3)
    found, whole = resampled(both, seed, samples), iou(both.sum(0))  # (samples, 2, C), (2, C)
    draws, miou = (np.diff(mean_iou(values))[..., 0] for values in (found, whole))
    rare = rare_classes(one)
    per_class = [
        None if rare[c] else Interval.of(whole[1, c] - whole[0, c], found[:, 1, c] - found[:, 0, c])
        for c in range(len(rare))
    ]
    return Comparison(Interval.of(float(miou), draws) if has_interval(one) else None, per_class, draws)
