"""Tests of the conversion of the full ADE20K to images and label maps of 847 classes, and of its errors."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.ade20k_full import IDS, VOID, class_ids, convert, read_pair
from spar_lightning.evaluation.benchmark_config import BenchmarkError
from tests import fake_benchmarks
from tests.evaluation.test_benchmark import opened


def test_colors() -> None:
    """Wall (2978) is red 110, green 162; the last digit of red does not count."""
    assert len(IDS) == len({*IDS}) == 847 and IDS[0] == 2978
    colors = np.array([[[110, 162, 7], [119, 162, 0], [0, 0, 0], [0, IDS.index(IDS[0]), 0]]], np.uint8)
    assert class_ids(colors).tolist() == [[0, 0, VOID, VOID]]
    every = np.array([[(number // 256 * 10, number % 256, 0) for number in IDS]], np.uint8)
    assert class_ids(every).tolist() == [[*range(847)]]


def test_every_validation_image(tmp_path: Path) -> None:
    fake_benchmarks.ade20k_full(tmp_path, [(24, 36), (40, 30)])
    folder = tmp_path / "ADE20K_2021_17_01"
    assert list(convert(folder)) == ["ADE_val_00000000", "ADE_val_00000001"]
    benchmark = opened("ade847", tmp_path)
    assert len(benchmark) == 2 and set(benchmark[0].labels.unique().tolist()) == {0, 846, IGNORED}
    assert benchmark[0].image.shape == (3, 24, 36)
    with pytest.raises(BenchmarkError, match="already exists"):
        next(convert(folder))


@pytest.mark.parametrize(
    ("size", "expected"), [((1024, 1200), (512, 600)), ((900, 600), (768, 512)), ((512, 900), (512, 900))]
)
def test_the_short_side(size: tuple[int, int], expected: tuple[int, int], tmp_path: Path) -> None:
    fake_benchmarks.ade20k_full(tmp_path, [size])
    image, values = read_pair(next(tmp_path.rglob("*.jpg")))
    assert image.size[::-1] == values.shape == expected
    assert set(np.unique(values).tolist()) == {0, 846, VOID}  # no values in between


def test_what_is_missing_or_damaged(tmp_path: Path) -> None:
    fake_benchmarks.ade20k_full(tmp_path, [(24, 36), (40, 30)])
    folder = tmp_path / "ADE20K_2021_17_01"
    segments = sorted(tmp_path.rglob("*_seg.png"))[1]
    Image.new("RGB", (9, 9)).save(segments)
    with pytest.raises(BenchmarkError, match="different sizes"):
        list(convert(folder))
    segments.write_bytes(segments.read_bytes()[:40])
    with pytest.raises(BenchmarkError, match=r"ADE_val_00000001\.jpg"):
        list(convert(folder))
    assert not list(folder.glob("*_detectron2/*"))
    with pytest.raises(BenchmarkError, match="--root"):
        next(convert(tmp_path))
