"""Tests of segmentation maps: bands of rows equal the whole-tensor computation; thresholds follow the protocol."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spar_lightning.errors import UserError
from spar_lightning.segmentation.label_map import Thresholds, bands, label_map


class Given:
    """Similarities (Q, h, w) in memory, yielded in pieces of any number of rows."""

    def __init__(self, cosines: Tensor, piece: int = 1000, names_at_once: int = 1000) -> None:
        self.cosines, self.piece, self.names_at_once = cosines, piece, names_at_once
        self.size = (cosines.shape[1], cosines.shape[2])
        self.passes = 0

    def rows(self, names: Tensor) -> Iterator[Tensor]:
        self.passes += 1
        yield from self.cosines[names].split(self.piece, dim=1)


def whole(cosines: Tensor, owner: Tensor, size: tuple[int, int], thresholds: Thresholds) -> Tensor:
    """Apply the protocol literally: all names at all pixels, softmax, maximum per class, thresholds."""
    pixels = F.interpolate(cosines[None], size, mode="bilinear", align_corners=False)[0]
    probability = (thresholds.logit_scale * pixels).softmax(0)
    classes = int(owner.max()) + 1
    scores = torch.stack([probability[owner == c].amax(0) for c in range(classes)])  # (C, H, W)
    if thresholds.area is not None:
        count = scores.argmax(0).flatten().bincount(minlength=classes)
        foreground = count[1:].sum()
        for c in range(1, classes):
            if count[c] <= thresholds.area * foreground:
                scores[c] *= 0
    labels = scores.argmax(0)
    labels[scores.amax(0) < thresholds.probability] = 0
    return labels


sizes = st.integers(1, 9)


@given(
    sizes, sizes, st.integers(1, 40), st.integers(1, 40), st.integers(2, 9), st.integers(1, 5), st.integers(1, 5),
    st.integers(1, 4000), st.sampled_from([0.0, 0.2, 0.5]), st.sampled_from([None, 0.0, 0.1, 0.4]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_equals_the_whole_tensors(
    h: int, w: int, height: int, width: int, names: int, piece: int, at_once: int, band: int, probability: float,
    area: float | None,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(h * 1000 + w * 100 + height)
    cosines = torch.rand(names, h, w, dtype=torch.float64, generator=generator) * 2 - 1
    owner = torch.randint(names - 1, (names,), generator=generator).sort().values
    owner = torch.unique(owner, return_inverse=True)[1]  # every class has a name
    thresholds = Thresholds(4.0, probability, area)
    expected = whole(cosines, owner, (height, width), thresholds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spar_lightning.segmentation.label_map.BAND", band)
        assert torch.equal(label_map(Given(cosines, piece, at_once), owner, (height, width), thresholds), expected)


@given(sizes, sizes, st.integers(1, 50), st.integers(1, 50), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_bands_are_the_bilinear_resize(h: int, w: int, height: int, width: int, piece: int) -> None:
    maps = torch.randn(3, h, w, dtype=torch.float64)
    expected = F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0]
    found = torch.full_like(expected, torch.nan)
    for rows, values in bands(maps.split(piece, dim=1), (h, w), (height, width)):
        found[:, rows] = values
    torch.testing.assert_close(found, expected)


def test_area_gives_up_small_classes_and_their_pixels_go_to_the_next_best() -> None:
    cosines = torch.tensor([[[0.1] * 10], [[0.5] * 9 + [0.2]], [[0.3] * 9 + [0.9]]])  # class 2 holds a tenth
    owner = torch.arange(3)
    assert label_map(Given(cosines), owner, (1, 10), Thresholds(area=0.09)).tolist() == [[1] * 9 + [2]]
    assert label_map(Given(cosines), owner, (1, 10), Thresholds(area=0.1)).tolist() == [[1] * 10]


def test_no_foreground_at_all() -> None:
    cosines = torch.tensor([[[0.9, 0.9]], [[0.1, 0.2]]])
    assert label_map(Given(cosines), torch.arange(2), (1, 2), Thresholds(area=0.1)).tolist() == [[0, 0]]


def test_improbable_pixels_become_background() -> None:
    cosines = torch.tensor([[[0.0, 0.0]], [[0.01, 1.0]]])
    owner = torch.arange(2)
    assert label_map(Given(cosines), owner, (1, 2), Thresholds(10, 0.6)).tolist() == [[0, 1]]
    assert label_map(Given(cosines), owner, (1, 2), Thresholds(10, 0.5)).tolist() == [[1, 1]]


def test_what_is_small_is_computed_once_for_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = Given(torch.rand(4, 6, 6))
    label_map(maps, torch.arange(4), (9, 9), Thresholds(area=0.1))
    assert maps.passes == 1
    monkeypatch.setattr("spar_lightning.segmentation.label_map.KEEP", 10)
    label_map(maps, torch.arange(4), (9, 9), Thresholds(area=0.1))
    assert maps.passes == 3


def test_features_that_are_no_numbers() -> None:
    cosines = torch.tensor([[[0.1, torch.nan]], [[0.2, torch.nan]]])
    with pytest.raises(UserError, match=r"NaN .*--precision 32-true"):
        label_map(Given(cosines), torch.arange(2), (1, 2), Thresholds())


@pytest.mark.parametrize("wrong", [{"logit_scale": 0.0}, {"probability": 1.0}, {"area": -0.1}, {"area": 1.0}])
def test_thresholds_outside_their_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"logit_scale .*probability .*area"):
        Thresholds(**wrong)
