"""Tests that the predicted cost of a cache equals its actual cost."""

import time

import numpy as np
import pytest
import torch

from spar_lightning.backbones import Tiny
from spar_lightning.datasets.augmentation import Augmentation
from spar_lightning.datasets.image_table import Images
from spar_lightning.feature_cache.cost import cost, windows_per_second
from spar_lightning.sliding_window import SlidingWindow
from tests.feature_cache.test_cache import sources

SMALL = Augmentation("small")


class Counting(torch.nn.Module):
    """Backbone that counts the windows it processes."""

    patch_size, window, windows = 8, 64, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.windows += len(images)
        return images[:, :1, ::8, ::8].permute(0, 2, 3, 1)


def test_windows_and_patches_are_those_of_the_teacher() -> None:
    images = Images.collect(sources(20), [(150 + i, 200) for i in range(20)])
    backbone = Counting()
    teacher = SlidingWindow(backbone, stride=24)
    expected = cost(images, SMALL, 0, teacher, channels=5, dtype="float16")
    patches = 0
    for i in range(20):
        record = SMALL.draw(150 + i, 200, 0, images[i].key)
        patches += teacher(torch.zeros(1, 3, record.crop_height, record.crop_width)).shape[1:3].numel()
    assert (expected.windows, expected.patches) == (backbone.windows, patches)
    assert expected.feature_bytes == patches * 5 * 2


def test_long_lists_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    images = Images.collect(sources(400), [(150, 200)] * 400)
    teacher = SlidingWindow(Counting(), stride=24)
    whole = cost(images, SMALL, 0, teacher, 5, "float16")
    monkeypatch.setattr("spar_lightning.feature_cache.cost.SAMPLED", 100)
    sampled = cost(images, SMALL, 0, teacher, 5, "float16")
    assert sampled.images == whole.images == 400
    assert sampled.windows != whole.windows
    assert abs(sampled.windows / whole.windows - 1) < 0.1


def test_images_that_will_be_rejected_cost_nothing() -> None:
    images = Images.collect(sources(2), [(0, 0), (150, 200)])
    assert cost(images, SMALL, 0, SlidingWindow(Counting()), 5, "float16").patches < 600


def test_the_rate_counts_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(0, 100, 2.0))  # every call takes two seconds
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    tiny = Tiny()
    teacher = SlidingWindow(tiny, stride=16)
    features = lambda image: teacher(tiny.normalize(image)[None])[0]  # noqa: E731
    assert windows_per_second(features, teacher, torch.device("cpu")) == 0.5
