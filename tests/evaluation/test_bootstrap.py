"""Tests of paired bootstrap intervals: their coverage on simulated images, and exactness of the counts."""

import numpy as np
import pytest
import torch

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.bootstrap import (
    LEVEL,
    SAMPLES,
    Counts,
    Interval,
    compare,
    dense,
    iou,
    miou_draws,
    warning,
)
from spar_lightning.evaluation.confusion import ConfusionMatrix


def population(images: int, rng: np.random.Generator) -> tuple[Counts, Counts]:
    """Return counts of two networks on images with five classes, which differ in difficulty and in their classes.

    The networks make many common errors, and the second is better on some classes only.
    """
    labeled = rng.gamma(1.0, 100, (images, 5)) * (rng.random((images, 5)) < (1, 0.8, 0.6, 0.5, 0.4))
    difficulty = rng.beta(2, 3, (images, 1))
    found = []
    for bonus in (0.0, np.array([0.0, 0.02, 0.05, -0.01, 0.0])):
        share = np.clip(1 - difficulty + bonus + rng.normal(0, 0.05, (images, 5)), 0, 1)
        hits = labeled * share
        wrong = (labeled - hits).sum(1, keepdims=True) * rng.dirichlet(np.full(5, 3), images)
        found.append(np.stack([hits, labeled, hits + wrong], axis=-1))
    return found[0], found[1]


def difference(one: Counts, other: Counts, seed: int = 0, samples: int = SAMPLES) -> Interval:
    """Return the difference of the mIoU of two networks."""
    found = compare(one, other, seed, samples).miou
    assert found is not None
    return found


@pytest.mark.slow
def test_coverage() -> None:
    """In 95 % of the samples of 200 images, within 2 points, the interval contains the difference on all images."""
    rng = np.random.default_rng(5)
    one, other = population(20_000, rng)
    miou = [np.nanmean(iou(counts.sum(0))) for counts in (one, other)]
    truth, covered, trials = miou[1] - miou[0], 0, 1000
    for trial in range(trials):
        chosen = rng.integers(0, len(one), 200)
        found = difference(one[chosen], other[chosen], trial)
        covered += int(found.low <= truth <= found.high)
    assert abs(covered / trials - LEVEL) <= 0.02


def test_a_network_does_not_differ_from_itself() -> None:
    one, other = population(100, np.random.default_rng(1))
    same = difference(one, one)
    assert (same.value, same.low, same.high) == (0, 0, 0) and not same.differs
    assert not any(each.differs for each in compare(one, one, 0).per_class if each is not None)
    there, back = difference(one, other), difference(other, one)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_rare_classes() -> None:
    """More than a tenth of them give a warning; with more than half, intervals are left out."""
    counts = np.zeros((20, 10, 3))
    counts[...] = 1
    for rare in range(10):
        counts[9:, rare] = 0
        found, text = compare(counts, counts, 0, 10), warning(counts)
        assert (found.miou is None) == (rare + 1 > 5)
        assert [each is None for each in found.per_class] == [c <= rare for c in range(10)]
        assert (text is None) == (rare == 0)
        assert text is None or text.startswith(f"{rare + 1} of 10 classes are labeled in fewer than 10 images")
        assert ("left out" in str(text)) == (found.miou is None)
    assert compare(np.zeros((3, 2, 3)), np.zeros((3, 2, 3)), 0, 10).miou is None  # no pixel is counted


def test_blocks_of_draws_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = population(30, np.random.default_rng(2))
    whole = difference(one, other, samples=50)
    monkeypatch.setattr("spar_lightning.evaluation.bootstrap.BLOCK", 1)
    assert difference(one, other, samples=50).low == pytest.approx(whole.low)


def test_counts_of_images_add_up_to_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [ConfusionMatrix(6) for _ in range(2)]
    for i in range(9):
        labels = torch.randint(4, (5, 7), generator=generator)  # classes 4 and 5 have no labels
        labels[0, :3] = IGNORED
        parts[i % 2].update(torch.randint(5, (5, 7), generator=generator), labels, i)
    parts[0].update(torch.zeros(5, 7, dtype=torch.long), torch.full((5, 7), IGNORED), 9)  # no pixel is counted
    total = parts[0].merge(parts[1])
    counts = dense(torch.cat(total.per_image).numpy(), 10, 6)
    assert counts.shape == (10, 6, 6) and not counts[9].any()
    matrix = total.matrix.numpy()
    assert np.array_equal(counts.sum(0)[:, :3], np.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)], axis=1))
    result = total.results()
    assert np.nanmean(iou(counts.sum(0)[:, :3])) == pytest.approx(result.miou) and np.isnan(
        iou(counts.sum(0)[:, :3])[5]
    )
    labeled, per_class = matrix.sum(1), np.nan_to_num(np.array(result.per_class))
    assert result.frequency_weighted == pytest.approx((labeled * per_class).sum() / labeled.sum())


def rare(images: int, rng: np.random.Generator, classes: int = 30) -> tuple[Counts, Counts]:
    """Return counts of two networks on many classes; class k is in a fraction of 1.2 / k of the images."""
    often = np.minimum(1, 1.2 / np.arange(1, classes + 1))
    quality, easy = rng.beta(2, 2, classes), 1 - rng.beta(2, 3, (images, 1))
    labeled = rng.gamma(1.0, 100, (images, classes)) * (rng.random((images, classes)) < often)
    found = []
    for bonus in (0.0, 0.05 * rng.random(classes)):
        share = 1.3 * quality * easy + bonus + rng.normal(0, 0.1, (images, classes))
        hits = labeled * np.clip(share, 0, 1)
        wrong = (labeled - hits).sum(1, keepdims=True) * rng.dirichlet(10 * often + 0.01, images)
        found.append(np.stack([hits, labeled, hits + wrong * (wrong > 1)], axis=-1))
    return found[0], found[1]


@pytest.mark.parametrize(("rarity", "images"), [("common", 200), pytest.param("rare", 1000, marks=pytest.mark.slow)])
def test_coverage_of_a_single_result(rarity: str, images: int) -> None:
    """Also if the rarest class is in 40 of 1000 images, so that the draws have a lower mIoU than the images."""
    rng = np.random.default_rng(6)
    everything, _ = rare(5000, rng) if rarity == "rare" else population(20_000, rng)
    truth, covered, trials = np.nanmean(iou(everything.sum(0))), 0, 1000
    for trial in range(trials):
        counts = everything[rng.integers(0, len(everything), images)]
        found = Interval.of_miou(float(np.nanmean(iou(counts.sum(0)))), miou_draws(counts, trial, 500))
        covered += int(found.low <= truth <= found.high)
    assert abs(covered / trials - LEVEL) <= 0.02
