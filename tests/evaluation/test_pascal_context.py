"""Tests of the conversion from 459 annotation values to label maps, and of the errors for missing files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from spar_lightning.evaluation.benchmark_config import BenchmarkError
from spar_lightning.evaluation.pascal_context import IDS, TARGETS, convert, to_60
from tests import fake_benchmarks
from tests.evaluation.test_benchmark import opened


def test_the_table() -> None:
    assert len(IDS) == 60 and list(IDS) == sorted(set(IDS)) and IDS[0] == 0
    values = np.array([0, 2, 9, 458, 1, 459], np.uint16)  # background, aeroplane, bag, wood; two without a class
    assert to_60(values).tolist() == [0, 1, 2, 59, 0, 0]


def test_every_validation_image(tmp_path: Path) -> None:
    fake_benchmarks.context(tmp_path, [(8, 10), (10, 8)])
    folder = tmp_path / "VOCdevkit" / "VOC2010"
    assert list(convert(folder, folder / "trainval", TARGETS["context"])) == ["2008_000000", "2008_000001"]
    labels = np.array(Image.open(folder / "SegmentationClassContext" / "2008_000001.png"))
    assert labels.shape == (10, 8) and set(np.unique(labels).tolist()) == {0, 1, 30, 59}
    assert (folder / "ImageSets/SegmentationContext/val.txt").read_text() == "2008_000000\n2008_000001\n"
    with pytest.raises(BenchmarkError, match=r"SegmentationContext/val\.txt"):
        next(convert(folder, folder / "trainval", TARGETS["context"]))
    assert len(list(convert(folder, folder / "trainval", TARGETS["context459"]))) == 2  # with the list of the other
    labels = np.array(Image.open(folder / "SegmentationClassContext459" / "2008_000001.png"))
    assert set(np.unique(labels).tolist()) == {IDS[1], IDS[30], IDS[59], 1, 459}
    assert set(opened("context459", tmp_path)[1].labels.unique().tolist()) == {i - 1 for i in (*IDS[1::29], 1, 459)}


def test_what_is_missing_or_damaged(tmp_path: Path) -> None:
    fake_benchmarks.context(tmp_path, [(8, 10), (10, 8)])
    folder = tmp_path / "VOCdevkit" / "VOC2010"
    annotations = folder / "trainval"
    with pytest.raises(BenchmarkError, match="--annotations"):
        next(convert(folder, folder / "nowhere", TARGETS["context"]))
    savemat(annotations / "2008_000001.mat", {"LabelMap": np.array([[3, 460]])})
    with pytest.raises(BenchmarkError, match=r"\b3\b.*\b460\b"):
        list(convert(folder, annotations, TARGETS["context459"]))
    savemat(annotations / "2008_000001.mat", {"LabelMap": np.array([[3.5, 4]])})
    with pytest.raises(BenchmarkError, match="float64"):
        list(convert(folder, annotations, TARGETS["context"]))
    savemat(annotations / "2008_000001.mat", {"other": np.zeros(3)})
    with pytest.raises(BenchmarkError, match=r"2008_000001\.mat .*'LabelMap'"):
        list(convert(folder, annotations, TARGETS["context"]))
    assert not (folder / "ImageSets/SegmentationContext/val.txt").exists()
    (annotations / "2008_000001.mat").unlink()
    with pytest.raises(BenchmarkError, match=r"\b1 of .*\b2 .*2008_000001\.mat"):
        next(convert(folder, annotations, TARGETS["context"]))
    (folder / "ImageSets/Main/val.txt").unlink()
    with pytest.raises(BenchmarkError, match=r"VOC2010.*--root"):
        next(convert(folder, annotations, TARGETS["context"]))
