"""Tests of paired bootstrap intervals: their coverage on simulated images, and exactness of the counts."""

import numpy as np
import pytest
import torch

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.bootstrap import LEVEL, Counts, Interval, compare, dense, iou, miou_draws, warning
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


def test_coverage() -> None:
    """In 95 % of the samples of 200 images, within 2 points, the interval contains the difference on all images."""
    rng = np.random.default_rng(5)
    one, other = population(20_000, rng)
    miou = [np.nanmean(iou(counts.sum(0))) for counts in (one, other)]
    truth, covered, trials = miou[1] - miou[0], 0, 1000
    for trial in range(trials):
        chosen = rng.integers(0, len(one), 200)
        found = compare(one[chosen], other[chosen], trial).miou
        covered += int(found.low <= truth <= found.high)
    assert abs(covered / trials - LEVEL) <= 0.02


def test_a_network_does_not_differ_from_itself() -> None:
    one, other = population(100, np.random.default_rng(1))
    same = compare(one, one, 0)
    assert (same.miou.value, same.miou.low, same.miou.high) == (0, 0, 0) and not same.miou.differs
    assert not any(each.differs for each in same.per_class if each is not None)
    there, back = compare(one, other, 0).miou, compare(other, one, 0).miou
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_rare_classes_are_a_warning() -> None:
    counts = np.zeros((20, 10, 3))
    counts[:, :, 1] = 1
    assert warning(counts) is None
    counts[9:, 0, 1] = 0
    assert warning(counts) is None  # a tenth of the classes
    counts[9:, 1, 1] = 0
    assert "2 of 10 classes are labeled in fewer than 10 images" in str(warning(counts))
    counts[:, 0, 1] = 0  # never labeled
    assert "1 of 9 classes" in str(warning(counts))


def test_blocks_of_draws_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = population(30, np.random.default_rng(2))
    whole = compare(one, other, 0, samples=50)
    monkeypatch.setattr("spar_lightning.evaluation.bootstrap.BLOCK", 1)
    assert compare(one, other, 0, samples=50).miou.low == pytest.approx(whole.miou.low)


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


@pytest.mark.parametrize(("rarity", "images"), [("common", 200), ("rare", 1000)])
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
