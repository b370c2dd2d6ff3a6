"""Tests of the synthetic images: a pure function of seed, index and canvas, with every class."""

import numpy as np

from spar_lightning.datasets.scene_renderer import CLASSES, render


def test_deterministic() -> None:
    first, second, other = render(3, 5, 48, 80), render(3, 5, 48, 80), render(4, 5, 48, 80)
    assert np.array_equal(first.image, second.image) and np.array_equal(first.labels, second.labels)
    assert not np.array_equal(first.image, other.image)
    assert first.image.shape == (48, 80, 3) and first.labels.shape == (48, 80)


def test_every_class_occurs_and_none_rules() -> None:
    labels = np.concatenate([render(0, i, 192, 192).labels.ravel() for i in range(30)])
    pixels = np.bincount(labels, minlength=len(CLASSES))
    share = pixels / pixels.sum()
    assert share.min() > 0.005
    assert share.max() < 0.3


def test_a_small_canvas_has_the_same_mixture_as_a_large_one() -> None:
    def objects(index: range, side: int) -> float:
        return float(np.mean([(render(0, i, side, side).labels >= 4).mean() for i in index]))

    assert abs(objects(range(300), 64) - objects(range(40), 192)) < 0.06
