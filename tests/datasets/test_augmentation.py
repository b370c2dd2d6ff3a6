"""Tests of the augmentation: released sizes, crops and flips, which depend only on seed and key."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spar_lightning.datasets import augmentation
from spar_lightning.datasets.augmentation import Augmentation, Preset, Record, SizeError
from spar_lightning.errors import UserError
from spar_lightning.image.resize import rescaled, resize_image


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (500, 375, (896, 672)),
        (500, 333, (1009, 672)),
        (375, 500, (672, 896)),
        (500, 281, (1196, 672)),
        (683, 512, (896, 672)),
        (500, 112, (2048, 459)),
        (256, 256, (672, 672)),
        (2592, 1944, (896, 672)),
    ],
)
def test_keep_ratio_rule(width: int, height: int, expected: tuple[int, int]) -> None:
    assert rescaled(height, width, (2048, 672)) == (expected[1], expected[0])


@given(st.integers(300, 3000), st.integers(300, 3000), st.text(min_size=1, max_size=8))
def test_results_are_multiples_of_16_and_at_least_512(height: int, width: int, key: str) -> None:
    record = Augmentation().draw(height, width, 0, key)
    assert record.crop_height % 16 == record.crop_width % 16 == 0
    assert min(record.crop_height, record.crop_width) >= 512
    assert 0 <= record.top <= record.height - record.crop_height
    assert 0 <= record.left <= record.width - record.crop_width


def test_token_statistics_of_the_released_configuration() -> None:
    # 3:2 images of SA-1B: mean 2712 tokens, maximum 5985 (from an independent simulation)
    records = [Augmentation().draw(1500, 2250, 0, f"sa_{i}") for i in range(4000)]
    tokens = np.array([r.crop_height * r.crop_width / 256 for r in records])
    assert abs(tokens.mean() - 2712) < 60
    assert tokens.max() <= 5985
    cropped = np.mean([(r.height, r.width) != (r.crop_height, r.crop_width) for r in records])
    assert 0.45 < cropped < 0.52
    assert abs(np.mean([r.flip for r in records]) - 0.5) < 0.03


def test_the_draw_depends_on_seed_and_key() -> None:
    draw = Augmentation().draw
    assert draw(1500, 2250, 0, "sa_1") == draw(1500, 2250, 0, "sa_1")
    assert draw(1500, 2250, 0, "sa_1") != draw(1500, 2250, 1, "sa_1")
    assert draw(1500, 2250, 0, "sa_1") != draw(1500, 2250, 0, "sa_2")


def test_apply_gives_the_recorded_size() -> None:
    augmentation = Augmentation(scale=(96, 64), min_side=32, multiple=8)
    image = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8)
    for key in map(str, range(20)):
        record = augmentation.draw(60, 90, 0, key)
        result = augmentation.apply(image, record)
        assert result.shape == (3, record.crop_height, record.crop_width)
        assert result.dtype == torch.uint8


def test_no_augmentation_keeps_the_pixels() -> None:
    augmentation = Augmentation("none", (96, 64), (1.0, 1.0), min_side=32, multiple=8)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    assert torch.equal(augmentation.apply(image, augmentation.draw(64, 96, 0, "a")), image)


def test_large_images_are_resized_channel_by_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float copy of a whole image with 13000 x 13000 pixels takes 2 GB."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # on one thread, PyTorch rounds a single channel differently than three
    try:
        image = torch.randint(0, 256, (3, 61, 93), dtype=torch.uint8)
        record = Record(32, 48, 8, 0, 24, 48, True)
        whole = Augmentation().apply(image, record)
        sizes = []

        def noted(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
            sizes.append(len(image))
            return resize_image(image, size)

        monkeypatch.setattr(augmentation, "LARGE", 61 * 93 - 1)
        monkeypatch.setattr(augmentation, "resize_image", noted)
        assert torch.equal(Augmentation().apply(image, record), whole) and sizes == [1, 1, 1]
    finally:
        torch.set_num_threads(threads)


def test_min_side_must_fit_the_multiple() -> None:
    with pytest.raises(UserError, match=r"min_side .*500"):
        Augmentation(min_side=500)


@pytest.mark.parametrize(("patch", "multiple", "min_side"), [(8, 16, 512), (16, 16, 512), (14, 14, 518), (32, 32, 512)])
def test_sides_follow_the_patch(patch: int, multiple: int, min_side: int) -> None:
    augmentation = Augmentation().for_patch(patch)
    assert (augmentation.settings.multiple, augmentation.settings.min_side) == (multiple, min_side)
    record = augmentation.draw(1500, 2250, 0, "sa_1")
    assert record.crop_height % patch == record.crop_width % patch == 0
    assert augmentation.for_patch(patch) is augmentation and Augmentation(multiple=patch).settings.min_side == min_side
    given = Augmentation("none", min_side=48, multiple=24)
    if patch == 8:
        assert given.for_patch(patch) is given
    else:
        with pytest.raises(UserError, match=rf"multiple is 24.* patches of {patch} pixels"):
            given.for_patch(patch)


def test_the_draw_of_version_1() -> None:
    """Fixed draws. If they must change, increase ALGORITHM in augmentation.py: older caches contain other pixels."""
    draws = [Augmentation().draw(1500, 2250, 0, f"sa_{i}") for i in (1, 2, 3)]
    assert draws == [
        Record(896, 1344, 0, 0, 896, 1344, True),
        Record(562, 843, 8, 17, 512, 784, True),
        Record(556, 834, 27, 281, 512, 512, False),
    ]


def test_presets() -> None:
    def sizes(name: Preset, height: int, width: int) -> list[Record]:
        return [Augmentation(name).draw(height, width, 0, f"sa_{i}") for i in range(2000)]

    text = [min(r.height, r.width) for r in sizes("text", 1500, 2250)]
    assert 512 <= min(text) < 540 and 2020 < max(text) <= 2048  # short side, uniform in 512 to 2048
    assert abs(np.mean(text) - 1280) < 40
    extended = [max(r.height, r.width) for r in sizes("extended", 1500, 2250)]
    assert max(extended) <= 2560 and max(extended) > 2500
    tokens = [r.crop_height * r.crop_width / 256 for r in sizes("extended", 1500, 2250)]
    assert abs(np.mean(tokens) - 5328) < 250  # from an independent simulation
    none = Augmentation("none").draw(1500, 2250, 0, "sa_1")
    assert none == Record(1488, 2240, 0, 0, 1488, 2240, False)
    assert Augmentation("none").draw(300, 400, 0, "sa_1")[:2] == (512, 672)  # enlarged to 512


@pytest.mark.parametrize(("height", "width", "least"), [(63, 500, 64), (500, 20, 64), (100, 1700, 107), (0, 0, 64)])
def test_images_that_are_too_small_or_too_long(height: int, width: int, least: int) -> None:
    with pytest.raises(SizeError, match=f"{height} x {width} .*{least}"):
        Augmentation().draw(height, width, 0, "sa_1")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop_range": (1.2, 1.5)}, "crop_range"),
        (
            {"ratio_range": (0.0, 0.0)},
            "ratio_range",
        ),
        ({"scale": (0, 512)}, "scale"),
    ],
)
def test_settings_without_meaning(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Augmentation(**settings)
