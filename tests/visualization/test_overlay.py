"""Tests of overlays: the image, its classes and the legend, for any image size."""

import numpy as np
import pytest

from spar_lightning.visualization.overlay import ENTRIES, LINE, LONGEST, OPACITY, overlay
from spar_lightning.visualization.palette import palette


def test_pixels_are_mixed_and_the_legend_has_the_classes_that_are_there() -> None:
    image = np.full((300, 400, 3), 200, np.uint8)
    labels = np.zeros((300, 400), np.int64)
    labels[:100] = 2
    picture = np.array(overlay(image, labels, ["floor", "nothing", "猫"], palette(3)))
    assert picture.shape[:2] == (300 + LINE + 16, 400)  # two classes, in one line of the legend
    for row, index in ((50, 2), (200, 0)):
        expected = (1 - OPACITY) * 200 + OPACITY * palette(3)[index].astype(float)
        assert np.abs(picture[row, 10] - expected).max() <= 0.5
    legend = {tuple(colour) for colour in picture[300:].reshape(-1, 3).tolist()}
    assert tuple(palette(3)[0]) in legend and tuple(palette(3)[2]) in legend and tuple(palette(3)[1]) not in legend


@pytest.mark.parametrize(("size", "shown"), [((1, 1), (256, 256)), ((500, 8000), (128, LONGEST)), ((3, 40), (18, 240))])
def test_sizes_that_a_screen_does_not_show(size: tuple[int, int], shown: tuple[int, int]) -> None:
    picture = overlay(np.zeros((*size, 3), np.uint8), np.zeros(size, np.int64), ["floor"], palette(1))
    assert picture.height == shown[0] + LINE + 16 and picture.width >= shown[1]


def test_a_legend_ends() -> None:
    labels = np.arange(1000).reshape(20, 50)
    picture = overlay(np.zeros((20, 50, 3), np.uint8), labels, [f"class {i}" for i in range(1000)], palette(1000))
    assert picture.height < 250 + 16 + (ENTRIES + 1) * LINE


def test_names_without_glyphs_do_not_end_the_drawing() -> None:
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    overlay(np.zeros((3, 4, 3), np.uint8), labels, ["two\nlines", "\r\x1b[31m", "\udcfc"], palette(3))
