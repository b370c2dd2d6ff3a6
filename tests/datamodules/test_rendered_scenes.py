"""Tests of the synthetic images on disk: tars in SA-1B's layout, labeled sets, the same bytes for a seed."""

import json
import tarfile
from pathlib import Path

import torch

from spar_lightning.datamodules import RenderedScenes
from spar_lightning.datasets.shard_index import scan
from spar_lightning.image.codec import decode_image


def drawn(root: Path) -> RenderedScenes:
    data = RenderedScenes(
        root=str(root), train_scenes=4, train_canvas=(48, 80), val_scenes=2, val_sizes=(32, 40), seed=9
    )
    data.draw()
    return data


def test_tars_have_the_layout_of_sa1b(tmp_path: Path) -> None:
    data = drawn(tmp_path)
    path = data.folder / "train" / "sa_000000.tar"
    with tarfile.open(path) as tar:
        assert tar.getnames() == [f"sa_{i}.{suffix}" for i in range(1, 5) for suffix in ("jpg", "json")]
        description = json.load(tar.extractfile("sa_2.json"))  # type: ignore[arg-type]
    image = decode_image(scan(str(path))[1].read())
    assert image.shape[-2:] == (description["image"]["height"], description["image"]["width"])
    assert description["image"]["file_name"] == "sa_2.jpg" and description["annotations"] == []
    assert 48 <= min(image.shape[-2:]) <= max(image.shape[-2:]) <= 80


def test_validation_sets(tmp_path: Path) -> None:
    for benchmark, size in zip(drawn(tmp_path).benchmarks, (32, 40), strict=True):
        benchmark.open()
        assert (benchmark.name, len(benchmark), len(benchmark.classes)) == (f"scenes_{size}", 2, 10)
        image = benchmark[1]
        assert image.image.shape == (3, size, size) and image.labels.shape == (size, size)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (drawn(tmp_path / name).folder for name in ("a", "b"))
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert len(files) == 1 + 1 + 2 * (1 + 2 + 2)
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


def test_training_and_validation_scenes_differ(tmp_path: Path) -> None:
    data = drawn(tmp_path)
    data.benchmarks[0].open()
    images = scan(data.shards[0])
    trained = [decode_image(images[i].read()) for i in range(len(images))]
    assert not any(torch.equal(image, data.benchmarks[0][0].image) for image in trained)
