"""A validation folder is read as it is, and what is wrong with it is said."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from spar_lightning.datamodules import Benchmark
from spar_lightning.datamodules.benchmark import BenchmarkError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    classes = [{"label": "round", "names": ["disc", "ring"]}, {"label": "bar", "names": ["bar"]}]
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump({"classes": classes}))
    for i in range(3):
        Image.fromarray(np.full((4, 6, 3), i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(np.full((4, 6), (0, 1, 255)[i], np.uint8)).save(tmp_path / "labels" / f"{i}.png")
    return tmp_path


def opened(folder: Path, **kwargs: int) -> Benchmark:
    benchmark = Benchmark(str(folder), **kwargs)  # type: ignore[arg-type]
    benchmark.open()
    return benchmark


def test_reads_images_labels_and_classes(folder: Path) -> None:
    benchmark = opened(folder)
    assert len(benchmark) == 3 and len(opened(folder, max_images=2)) == 2
    assert benchmark.classes == {"round": ("disc", "ring"), "bar": ("bar",)}
    image = benchmark[1]
    assert image.image.shape == (3, 4, 6) and image.labels.unique().tolist() == [1]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"should lie in .*nowhere.*benchmark.yaml does not exist"):
        opened(tmp_path / "nowhere")


def test_missing_labels(folder: Path) -> None:
    (folder / "labels" / "2.png").unlink()
    with pytest.raises(BenchmarkError, match=r"2.png has no labels"):
        opened(folder)[2]


def test_labels_of_another_size(folder: Path) -> None:
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(folder / "labels" / "0.png")
    with pytest.raises(BenchmarkError, match=r"0.png is \(4, 5\), but its image \(4, 6\)"):
        opened(folder)[0]


def test_a_label_without_class(folder: Path) -> None:
    Image.fromarray(np.full((4, 6), 2, np.uint8)).save(folder / "labels" / "0.png")
    with pytest.raises(BenchmarkError, match=r"holds class 2, but .* has 2 classes: 0 to 1"):
        opened(folder)[0]
