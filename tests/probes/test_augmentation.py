"""Tests of the augmentation of labeled images."""

import numpy as np
import pytest
import torch

from spar_lightning.datasets.samples import IGNORED, LabelledImage
from spar_lightning.probes.augmentation import augmented, jittered, square_starts


def image(height: int, width: int) -> LabelledImage:
    """Return an image whose red channel is 20 times its label, with four columns of labels."""
    labels = (torch.arange(width) * 4 // width).expand(height, width).to(torch.int16)
    pixels = torch.stack([20 * labels, torch.zeros_like(labels), torch.zeros_like(labels)]).to(torch.uint8)
    return LabelledImage("a", pixels, labels)


def test_the_size_is_kept_and_half_of_the_images_are_mirrored() -> None:
    found = [augmented(image(20, 24), None, np.random.default_rng(i)) for i in range(100)]
    assert {tuple(each.image.shape) for each in found} == {(3, 20, 24)}
    mirrored = sum(each.labels[0, 0] == 3 for each in found)
    assert 35 <= mirrored <= 65
    assert all(set(each.labels[0].tolist()) == {0, 1, 2, 3} for each in found)


def test_the_same_generator_gives_the_same_image() -> None:
    one, other, third = (augmented(image(40, 30), 32, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.image, other.image) and torch.equal(one.labels, other.labels)
    assert not torch.equal(one.image, third.image)


def test_crops_are_square_and_labels_fit_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spar_lightning.probes.augmentation.jittered", lambda image, rng: image)
    seen = set()
    for seed in range(50):
        crop = augmented(image(50, 70), 32, np.random.default_rng(seed))
        assert crop.image.shape == (3, 32, 32) and crop.labels.shape == (32, 32)
        labeled = crop.labels != IGNORED
        assert labeled.any() and (crop.image[:, ~labeled] == 0).all()
        # Between two columns, resizing mixes their colors.
        exact = (crop.image[0][labeled] - 20 * crop.labels[labeled]).abs() <= 1
        assert exact.float().mean() > 0.7
        seen.add(bool(labeled.all()))
    assert seen == {False, True}  # some images are padded, others larger than the crop


def test_a_crop_without_labels_is_drawn_again() -> None:
    labels = torch.full((64, 64), IGNORED, dtype=torch.int16)
    labels[:20, :20] = 1
    rare = LabelledImage("a", torch.zeros(3, 64, 64, dtype=torch.uint8), labels)
    found = [(augmented(rare, 24, np.random.default_rng(i)).labels != IGNORED).any().item() for i in range(40)]
    assert sum(found) >= 38
    nothing = rare._replace(labels=torch.full_like(labels, IGNORED))
    assert (augmented(nothing, 24, np.random.default_rng(0)).labels == IGNORED).all()


def test_colors_change_a_little() -> None:
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    found = [jittered(pixels, np.random.default_rng(i)) for i in range(64)]
    assert all(each.shape == pixels.shape and each.dtype == torch.uint8 for each in found)
    unchanged = sum(torch.equal(each, pixels) for each in found)
    assert 0 < unchanged < 16  # with probability 1/16, nothing changes


def test_squares_cover_the_long_side() -> None:
    assert square_starts(512, 512) == [0]
    assert square_starts(513, 512) == [0, 1]
    assert square_starts(1200, 512) == [0, 344, 688]
