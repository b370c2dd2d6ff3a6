"""Tests of panoptic segments from instance maps in the layouts of Cityscapes and ADE20K, and of one's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from spar_lightning.datasets.samples import IGNORED
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.benchmark_config import BenchmarkError
from spar_lightning.evaluation.segments import is_thing, read_segments


def save(path: Path, values: Any, dtype: type = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, dtype)).save(path)


def read(benchmark: Benchmark) -> tuple[list[list[int]], list[int]]:
    segments = read_segments(benchmark, 0, benchmark[0].labels)
    return segments.ids.tolist(), segments.classes.tolist()


def cityscapes(root: Path, instances: list[list[int]]) -> Benchmark:
    folder = root / "cityscapes"
    stem = "aachen/aachen_000000_000000"
    values = np.array(instances)
    save(folder / "leftImg8bit" / "val" / f"{stem}_leftImg8bit.png", np.zeros((*values.shape, 3)))
    labels = np.where(values >= 1000, values // 1000, values)
    save(folder / "gtFine" / "val" / f"{stem}_gtFine_labelIds.png", labels)
    save(folder / "gtFine" / "val" / f"{stem}_gtFine_instanceIds.png", values, np.uint16)
    benchmark = Benchmark("cityscapes", str(root))
    benchmark.open()
    return benchmark


def test_cityscapes(tmp_path: Path) -> None:
    """Road (label 7), two cars (26), a group of cars, and a pixel that is not evaluated (label 3)."""
    benchmark = cityscapes(tmp_path, [[7, 7, 26001, 26001, 26, 26002, 3]])
    assert read(benchmark) == ([[0, 0, 1, 1, IGNORED, 2, IGNORED]], [0, 13, 13])
    assert is_thing(benchmark).nonzero()[:, 0].tolist() == list(range(11, 19))


def ade20k(root: Path, labels: list[list[int]], instances: list[list[tuple[int, int, int]]]) -> Benchmark:
    folder = root / "ADEChallengeData2016"
    save(folder / "images" / "validation" / "a.jpg", np.zeros((*np.shape(labels), 3)))
    save(folder / "annotations" / "validation" / "a.png", labels)
    save(folder / "annotations_instance" / "validation" / "a.png", instances)
    benchmark = Benchmark("ade20k", str(root))
    benchmark.open()
    return benchmark


def test_ade20k(tmp_path: Path) -> None:
    """Wall (1), two beds (8, category 1), a bed without an instance, a windowpane (9, category 2) over wall."""
    none = (0, 0, 0)
    instances = [[none, (1, 1, 0), (1, 2, 0), none, (2, 1, 0), none]]
    benchmark = ade20k(tmp_path, [[1, 8, 8, 8, 1, 0]], instances)
    assert read(benchmark) == ([[0, 1, 2, IGNORED, 3, IGNORED]], [0, 7, 7, 8])
    assert int(is_thing(benchmark).sum()) == 100
    (tmp_path / "ADEChallengeData2016" / "annotations_instance" / "validation" / "a.png").unlink()
    with pytest.raises(BenchmarkError, match=r"annotations_instance/validation/a\.png does not exist"):
        read(benchmark)


def test_an_unknown_category(tmp_path: Path) -> None:
    benchmark = ade20k(tmp_path, [[8]], [[(101, 1, 0)]])
    with pytest.raises(BenchmarkError, match="category 101, but only 100"):
        read(benchmark)


def own(root: Path, **instances: Any) -> Benchmark:
    save(root / "images" / "a.png", np.zeros((1, 4, 3)))
    save(root / "labels" / "a.png", [[0, 1, 1, 255]])
    classes = [{"label": name, "names": [name]} for name in ("sky", "cat")]
    (root / "benchmark.yaml").write_text(yaml.safe_dump({"classes": classes, **instances}))
    benchmark = Benchmark(str(root))
    benchmark.open()
    return benchmark


def test_ones_own_instances(tmp_path: Path) -> None:
    save(tmp_path / "things" / "a.png", [[7, 5, 9, 9]])
    benchmark = own(tmp_path, instances={"file": "things/{}.png", "things": ["cat"]})
    assert read(benchmark) == ([[0, 1, 2, IGNORED]], [0, 1, 1])  # numbers of stuff have no effect
    save(tmp_path / "things" / "a.png", [[7, 5]])
    with pytest.raises(BenchmarkError, match=r"has shape \(1, 2\), but the label map has \(1, 4\)"):
        read(benchmark)
    with pytest.raises(BenchmarkError, match=r"'cut' is not the label of a class\. Did you mean cat"):
        own(tmp_path, instances={"file": "things/{}.png", "things": ["cut"]})


def test_without_instances_all_is_stuff(tmp_path: Path) -> None:
    benchmark = own(tmp_path)
    assert read(benchmark) == ([[0, 1, 1, IGNORED]], [0, 1]) and not is_thing(benchmark).any()
    assert read_segments(benchmark, 0, torch.full((1, 4), IGNORED)).classes.tolist() == []
