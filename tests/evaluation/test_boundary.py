"""Tests of boundary regions against erosion of each class by itself, and of Boundary IoU of hand-made cases."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.boundary import boundary, distance
from spar_lightning.evaluation.confusion import ConfusionMatrix


def eroded(labels: NDArray[np.int64], distance: int) -> NDArray[np.bool_]:
    """Return the boundary regions by the published procedure: each mask minus its erosion, with a frame of zeros."""
    found = np.zeros(labels.shape, bool)
    for label in np.unique(labels):
        mask = np.pad(labels == label, 1)
        inner = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=distance, border_value=1)
        found |= (mask & ~inner)[1:-1, 1:-1]
    return found


@given(st.integers(1, 25), st.integers(1, 25), st.integers(1, 9), st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_equals_erosion(height: int, width: int, block: int, width_of_region: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 3, (height // block + 1, width // block + 1))
    labels = np.kron(cells, np.ones((block, block), np.int64))[:height, :width]
    found = boundary(torch.from_numpy(labels.copy()), width_of_region)
    assert np.array_equal(found.numpy(), eroded(labels, width_of_region))


def test_distance() -> None:
    """2 % of the diagonal, rounded, at least one pixel."""
    assert [distance(*size) for size in ((1, 1), (375, 500), (1024, 2048))] == [1, 12, 46]


def square(left: int, size: int = 20, side: int = 60) -> torch.Tensor:
    """Return a label map with a square of class 1."""
    labels = torch.zeros(side, side, dtype=torch.long)
    labels[20 : 20 + size, left : left + size] = 1
    return labels


def test_boundary_iou_by_hand() -> None:
    """A square of 20 pixels, predicted one pixel too far to the right; boundary regions are 2 pixels wide."""
    counts = ConfusionMatrix(2)
    counts.update(square(21), square(20), 0)
    ring = 20 * 20 - 16 * 16
    common = 2 * (2 * 19) + 2 * 16  # rows at the top and bottom, and one column of two at each side
    result = counts.results()
    assert result.boundary is not None
    assert result.boundary[1] == pytest.approx(100 * common / (2 * ring - common))
    assert result.per_class[1] == pytest.approx(100 * 19 / 21)
    assert result.boundary[1] < result.per_class[1]


def test_a_perfect_prediction_next_to_ignored_pixels() -> None:
    labels = square(20)
    labels[30:, :] = IGNORED
    predicted = square(20)
    predicted[35:, 10:] = 1
    counts = ConfusionMatrix(3)
    counts.update(predicted, labels.to(torch.int16), 0)
    result = counts.results()
    assert result.boundary is not None and result.boundary[:2] == [100, 100] and np.isnan(result.boundary[2])


@pytest.mark.parametrize("ranks", [1, 3])
def test_any_number_of_ranks(ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [ConfusionMatrix(3) for _ in range(ranks)]
    sums = np.zeros((3, 3))
    for i in range(7):
        predicted, labels = (torch.randint(3, (30, 40), generator=generator) for _ in range(2))
        parts[i % ranks].update(predicted, labels, i)
        regions = [eroded(each.numpy(), distance(30, 40)) for each in (predicted, labels)]
        for label in range(3):
            found, true = (
                region & (each.numpy() == label) for region, each in zip(regions, (predicted, labels), strict=True)
            )
            sums[label] += (found & true).sum(), true.sum(), found.sum()
    result = parts[0].merge(*parts[1:]).results()
    hits, true, found = sums.T
    assert result.boundary == pytest.approx((100 * hits / (true + found - hits)).tolist())
