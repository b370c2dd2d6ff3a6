"""Bootstrap over images: confidence intervals of the difference of two mIoU values.

Images are drawn with replacement, the same ones for both networks (paired), and the mIoU is computed from the sums of
their counts. The interval has the quantiles of the differences (percentile bootstrap; Efron, 1979). It covers the
choice of images only, not that of training seeds, prompts or class names.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

SAMPLES: Final = 2000  # draws of images
LEVEL: Final = 0.95  # probability that an interval covers the difference on all images of the same kind
SEED: Final = 0
BLOCK: Final = 2**24  # numbers in a block of draws

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Difference in percentage points, and its confidence interval."""

    difference: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """True if the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Differences of two networks on the same images.

    Attributes:
        miou: Difference of the mIoU.
        per_class: Difference of the IoU of each class; None for a class that never occurs.
    """

    miou: Interval
    per_class: list[Interval | None]


def dense(per_image: NDArray[np.int64], images: int, classes: int) -> Counts:
    """Return counts (images, C, 3) of correct, labeled and predicted pixels, in the order of the image indices.

    Args:
        per_image: Rows of image, class and the three counts (n, 5).
        images: Number of images.
        classes: Number of classes C.
    """
    counts = np.zeros((images, classes, 3))
    counts[per_image[:, 0], per_image[:, 1]] = per_image[:, 2:]
    return counts


def iou(counts: Counts) -> Counts:
    """Return the IoU in percent (..., C) of counts (..., C, 3); NaN for a class that does not occur."""
    hits, labeled, predicted = np.moveaxis(counts, -1, 0)
    union = labeled + predicted - hits
    share: Counts = np.divide(hits, union, out=np.full_like(union, np.nan), where=union > 0)
    return 100 * share


def compare(one: Counts, other: Counts, samples: int = SAMPLES, seed: int = SEED) -> Comparison:
    """Return the differences `other - one` with confidence intervals.

    Args:
        one: Counts of the first network (images, C, 3).
        other: Counts of the second network on the same images, in the same order.
        samples: Number of draws of images.
        seed: Seed of the draws.
    """
    assert one.shape == other.shape
    images, classes, _ = one.shape
    rng = np.random.default_rng(seed)
    both = np.concatenate([one, other], axis=1).reshape(images, -1)  # (images, 2 * C * 3)
    draws = []
    block = max(1, BLOCK // max(both.shape[1], images))
    for start in range(0, samples, block):
        drawn = rng.integers(images, size=(min(block, samples - start), images))
        drawn += images * np.arange(len(drawn))[:, None]
        weights = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)  # how often each image is drawn
        sums = (weights.astype(np.float64) @ both).reshape(-1, 2, classes, 3)
        draws.append(iou(sums))
    found = np.concatenate(draws)  # (samples, 2, C)
    whole = iou(np.stack([one.sum(0), other.sum(0)]))  # (2, C)

    def interval(value: Counts, values: Counts) -> Interval | None:
        differences = values[:, 1] - values[:, 0]
        differences = differences[np.isfinite(differences)]
        if not len(differences) or not np.isfinite(value).all():
            return None
        low, high = np.quantile(differences, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return Interval(float(value[1] - value[0]), float(low), float(high))

    miou = interval(np.nanmean(whole, axis=-1), np.nanmean(found, axis=-1))
    assert miou is not None
    return Comparison(miou, [interval(whole[:, c], found[:, :, c]) for c in range(classes)])
