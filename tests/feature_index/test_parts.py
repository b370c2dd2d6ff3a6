"""Large images in parts: an index has the features of the whole image, and lists complete images only."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spar_lightning.cli import main
from spar_lightning.datasets.image_source import Source
from spar_lightning.datasets.image_table import Images
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.datasets.shard_index import scan_all
from spar_lightning.feature_cache.extract import Dtype
from spar_lightning.feature_cache.shard import CacheError
from spar_lightning.feature_index import FeatureIndex, Origin, WritableIndex, build, parts
from spar_lightning.feature_index.parts import Part, PartialFeatures, complete, divided, image_of, part_of
from spar_lightning.image import rows
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.student import load_student

CLASSES = {"red": ["red dot"], "rest": ["plain", "grain"]}
BLOCKS = {"block_size": 64}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a small image and two large ones, one of them stored on its side; parts have few rows."""
    for module in (build, parts):
        monkeypatch.setattr(module, "PART", 30_000, raising=False)
    monkeypatch.setattr(rows, "LARGE", 10_000)
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(render(3, 0, 64, 72).image).save(folder / "a.png")
    Image.fromarray(render(3, 1, 250, 90).image).save(folder / "b.png")
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees
    Image.fromarray(render(3, 2, 120, 200).image).save(folder / "side.jpg", exif=exif, quality=95)
    return folder


def segmenter(**inference: object) -> Segmenter:
    return load_student("tiny", inference={**BLOCKS, **inference}).segmenter(CLASSES)


def written(root: Path, photos: Path, dtype: Dtype = "float32") -> WritableIndex:
    index = WritableIndex(root, segmenter(), dtype, Origin("tiny"))
    index.add(scan_all([str(photos)], root, show=False, whole_names=True), show=False)
    return index


@pytest.mark.parametrize("stored_in", ["folder", "tar"])
def test_features_and_labels_are_those_of_the_whole_image(stored_in: str, photos: Path, tmp_path: Path) -> None:
    place = photos
    if stored_in == "tar":
        place = tmp_path / "photos.tar"
        with tarfile.open(place, "w") as tar:
            for file in sorted(photos.iterdir()):
                tar.add(file, file.name)
    written(tmp_path / "index", place)
    index = FeatureIndex(tmp_path / "index")
    assert index.names == ["a.png", "b.png", "side.jpg"] and len(index) == 3
    assert len(list((tmp_path / "index" / "shards").iterdir())) > 8
    network = segmenter()
    for i, (name, size) in enumerate({"a.png": (64, 72), "b.png": (250, 90), "side.jpg": (200, 120)}.items()):
        torch.testing.assert_close(index.features(i), network.features(photos / name))
        labels = network(photos / name)
        assert index.size(i) == size == tuple(labels.shape)
        assert torch.equal(index.labels(i, CLASSES), labels)
        assert index.preview(i).shape == (3, *size)
        (areas,) = index.areas(CLASSES, [i])
        assert areas.sum() == pytest.approx(1)


def test_parts_are_computed_without_repetition(photos: Path, tmp_path: Path) -> None:
    network, blocks = segmenter(), [0]
    network.backbone.register_forward_hook(lambda _, images, __: blocks.__setitem__(0, blocks[0] + len(images[0])))
    index = WritableIndex(tmp_path, network, "float16", Origin("tiny"))
    images = scan_all([str(photos)], tmp_path, show=False, whole_names=True)
    assert network.blocks is not None
    expected = sum(network.blocks.count(*size) for size in ((64, 72), (248, 88), (200, 120)))
    assert index.blocks(index.missing(images)) == expected
    index.add(images, show=False)
    assert blocks == [expected]
    assert not len(index.missing(images)) and index.blocks(index.missing(images)) == 0


def test_an_image_with_missing_parts_is_not_listed(photos: Path, tmp_path: Path) -> None:
    index = written(tmp_path, photos)
    whole = FeatureIndex(tmp_path)
    features = whole.features(1)
    names, keys, shard, _ = index.index.places()
    lost = shard[next(i for i, key in enumerate(keys.tolist()) if key.startswith(b"b.png#"))]
    (tmp_path / "shards" / names[lost]).unlink()
    found = FeatureIndex(tmp_path)
    assert found.names == ["a.png", "side.jpg"] and found.unfinished == 1
    again = WritableIndex(tmp_path, segmenter(), "float32", Origin("tiny"))
    images = scan_all([str(photos)], tmp_path, show=False, whole_names=True)
    assert len(again.missing(images)) == 1
    again.add(images, show=False)
    found = FeatureIndex(tmp_path)
    assert found.names == whole.names and torch.equal(found.features(1), features)


def test_a_damaged_image_is_listed_once(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def counted(path: Path) -> rows.ImageRows:
        opened.append(path)
        return rows.as_rows(path)

    monkeypatch.setattr(build, "as_rows", counted)
    content = (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(content[: len(content) // 2])
    index = written(tmp_path, photos)
    assert len(index.index.rejected()) > 1
    assert opened.count(photos / "b.png") < len(index.index.rejected())  # parts behind the damage are not tried
    found = FeatureIndex(tmp_path)
    assert found.names == ["a.png", "side.jpg"] and list(found.rejected) == ["b.png"] and found.unfinished == 0
    assert "b.png cannot be read as an image" in found.rejected["b.png"]
    assert main(["cache", "info", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}: 2 images with features" in said and said.count("cannot be used: b.png (") == 1


def test_an_index_without_a_complete_image(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "side.jpg"):
        (photos / name).unlink()
    written(tmp_path, photos)
    (tmp_path / "shards" / "00001.h5").unlink()
    assert main(["query", str(tmp_path), "--classes", "red dot; plain"]) == 2
    assert "contains no complete image. Run spar index to the end" in capsys.readouterr().err
    index = ["index", str(photos), "--weights", "tiny", "--block_size", "64", "--dtype", "float32"]
    assert main([*index, "--out", str(tmp_path)]) == 0
    assert "1 images to do (1 of their 7 parts), 0 done" in capsys.readouterr().out


def build_again(root: Path, photos: Path) -> tuple[WritableIndex, Images, FeatureIndex]:
    index = written(root, photos)
    return index, scan_all([str(photos)], root, show=False, whole_names=True), FeatureIndex(root)


@pytest.mark.parametrize("size", [(330, 90), (40, 40)])
def test_an_image_that_was_replaced_is_an_error(size: tuple[int, int], photos: Path, tmp_path: Path) -> None:
    written(tmp_path, photos)
    for name in ("b.png", "a.png"):  # formerly in parts, and whole
        content = (photos / name).read_bytes()
        Image.fromarray(render(3, 7, *size).image).save(photos / name)
        with pytest.raises(CacheError, match=f"Image {name} .*differs"):
            written(tmp_path, photos)
        (photos / name).write_bytes(content)
    assert FeatureIndex(tmp_path).names == ["a.png", "b.png", "side.jpg"]


def test_a_damaged_image_can_be_repaired(photos: Path, tmp_path: Path) -> None:
    """The parts above the damage are computed again, because they have the digest of the damaged file."""
    noise = np.random.default_rng(0).integers(0, 256, (1600, 90, 3), np.uint8)
    Image.fromarray(noise).save(photos / "b.png")
    good = (photos / "b.png").read_bytes()
    place = len(good) * 3 // 4
    (photos / "b.png").write_bytes(good[:place] + bytes(100) + good[place + 100 :])
    index, images, found = build_again(tmp_path, photos)
    assert list(index.unusable(images)) == list(found.rejected) == ["b.png"] and found.names == ["a.png", "side.jpg"]
    (photos / "b.png").write_bytes(good)
    index, images, found = build_again(tmp_path, photos)
    assert index.unusable(images) == found.rejected == {} and found.names == ["a.png", "b.png", "side.jpg"]
    torch.testing.assert_close(found.features(1), segmenter().features(photos / "b.png"))


def test_an_unreadable_file_is_replaced_by_a_large_image(photos: Path, tmp_path: Path) -> None:
    good = (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(b"nothing")
    index, images, found = build_again(tmp_path, photos)
    assert list(index.unusable(images)) == list(found.rejected) == ["b.png"]
    (photos / "b.png").write_bytes(good)
    index, images, found = build_again(tmp_path, photos)
    assert index.unusable(images) == found.rejected == {} and found.names == ["a.png", "b.png", "side.jpg"]


def test_a_limit_of_the_side_is_applied_to_large_files(photos: Path, tmp_path: Path) -> None:
    network = load_student("tiny", inference=BLOCKS).segmenter({}, 100)
    index = WritableIndex(tmp_path, network, "float32", Origin("tiny"))
    index.add(scan_all([str(photos)], tmp_path, show=False, whole_names=True), show=False)
    found = FeatureIndex(tmp_path)
    assert found.names == ["a.png", "b.png", "side.jpg"] and found.size(1) == (250, 90)
    for i, name in enumerate(found.names):
        torch.testing.assert_close(found.features(i), network.features(photos / name))


def test_an_image_that_changes_during_the_build(photos: Path, tmp_path: Path) -> None:
    index = WritableIndex(tmp_path, segmenter(), "float16", Origin("tiny"))
    images = scan_all([str(photos)], tmp_path, show=False, whole_names=True)
    Image.fromarray(render(3, 7, 250, 90).image).save(photos / "b.png")
    with pytest.raises(Exception, match=r"the bytes of b\.png#.* have changed since it was indexed"):
        index.add(images, show=False)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_other_precisions(dtype: Dtype, photos: Path, tmp_path: Path) -> None:
    written(tmp_path, photos, dtype)
    found, network = FeatureIndex(tmp_path), segmenter()
    for i, file in enumerate(["a.png", "b.png", "side.jpg"]):
        expected = network.features(photos / file)
        assert (found.features(i) - expected).norm() / expected.norm() < 0.02


def test_a_refinement_is_not_applied_to_blocks(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, photos)
    config = tmp_path / "refined.yaml"
    config.write_text(
        "model: {backbone: spar_lightning.backbones.Tiny, "
        "refine: {class_path: spar_lightning.refinement.LPOSS, init_args: {preset: pretrained}}}"
    )
    index = FeatureIndex(tmp_path, weights="tiny", config=config)
    assert torch.equal(index.labels(0, CLASSES), segmenter()(photos / "a.png"))
    assert index.student.config.refine is not None and "Queries do not use the refinement of tiny" in caplog.text


def test_names_of_parts() -> None:
    one, two = "0123abcd", "4567abcd"
    assert part_of(f"a/b.png#3-17:20:{one}") == Part("a/b.png", 3, 17, 20, one)
    assert part_of("a#3-17.png") is None and image_of("a#3-17.png") == "a#3-17.png"
    assert image_of(f"odd#1-2:3:{one}.png#0-4:8:{two}") == f"odd#1-2:3:{one}.png"
    keys = [f"x#0-2:5:{one}", "a", f"x#2-5:5:{one}", f"y#0-2:5:{one}", f"z#2-5:5:{one}", f"w#0-1:2:{one}"]
    assert complete([*keys, f"w#1-2:3:{one}", f"x#0-5:6:{two}", f"y#2-5:5:{two}"]) == {"x": [0, 2], "a": [1]}


def test_only_large_images_are_divided() -> None:
    sources = [Source(f"{name}.png", "photos", f"{name}.png", 0, 1, "00" * 16) for name in "abc"]
    images = Images.collect(sources, [(10, 10)] * 3)
    table = divided(images, {1: (10, 4)})
    parts_of_b = [f"b.png#{rows}:10:00000000".encode() for rows in ("0-3", "3-7", "7-10")]
    assert table.keys.tolist() == [b"a.png", *parts_of_b, b"c.png"]
    assert [table[i].name for i in range(5)] == ["a.png", "b.png", "b.png", "b.png", "c.png"]


def test_rows_are_computed_again_only_after_a_gap() -> None:
    features, starts = torch.arange(20.0)[:, None, None].expand(20, 2, 3), []

    def compute(first: int) -> Iterator[Tensor]:
        starts.append(first)
        yield from features[first:].split(3)

    partial = PartialFeatures(compute)
    for first, last in ((0, 4), (4, 5), (5, 13), (16, 20), (2, 4), (4, 20)):
        assert np.array_equal(partial.read(first, last), features[first:last])
    assert starts == [0, 16, 2]
