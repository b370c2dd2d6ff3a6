"""Tests of class colors: they are distinguishable, and each class keeps its color."""

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from spar_lightning.visualization.palette import RESERVED, palette


@pytest.mark.parametrize(("classes", "apart"), [(10, 19), (20, 14), (40, 9), (60, 8), (150, 4), (1000, 1)])
def test_colours_are_apart(classes: int, apart: float) -> None:
    """Check CIEDE2000 distances; a distance of 1 is just noticeable side by side."""
    lab = rgb2lab(np.concatenate([palette(classes)[:-1], np.array(RESERVED, np.uint8)])[None] / 255)[0]
    distances = deltaE_ciede2000(lab[:, None], lab[None])  # type: ignore[no-untyped-call]
    np.fill_diagonal(distances, np.inf)
    assert distances.min() > apart


def test_a_class_keeps_its_colour_whatever_follows() -> None:
    assert palette(7).shape == (8, 3) and palette(7).dtype == np.uint8
    assert np.array_equal(palette(300)[:7], palette(7)[:-1])
    assert not palette(7)[-1].any()  # black, for ignored pixels


def test_more_classes_than_colours_have_colours_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spar_lightning.visualization.palette.LEVELS", 5)
    many = palette(77)
    assert len(many) == 78 and 10 < len(np.unique(many[:-1], axis=0)) < 27
