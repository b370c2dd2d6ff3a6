"""Feature index: its maps equal those of the segmenter, areas rank the images, and wrong folders are rejected."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spar_lightning.datasets.scene_renderer import render
from spar_lightning.datasets.shard_index import scan_all
from spar_lightning.errors import UserError
from spar_lightning.export import safetensors
from spar_lightning.feature_cache.cache import FeatureCache
from spar_lightning.feature_cache.extract import Dtype
from spar_lightning.feature_cache.shard import CacheError
from spar_lightning.feature_index import FeatureIndex, Origin, WritableIndex, ranking
from spar_lightning.refinement import LPOSS
from spar_lightning.student import load_student

CLASSES = {"red": ["red dot"], "blue": ["blue dot"], "rest": ["plain", "grain", "waves", "checks"]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images of several sizes; one is in a subfolder and stored on its side."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i, size in enumerate([(72, 130), (128, 64), (90, 90)]):
        Image.fromarray(render(3, i, *size).image).save(folder / f"{i}.png")
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees
    Image.fromarray(render(3, 9, 64, 120).image).save(folder / "more" / "side.jpg", exif=exif, quality=95)
    return folder


def build(root: Path, photos: Path, dtype: Dtype = "float32", max_side: int | None = None, **inference: Any) -> None:
    student = load_student("tiny", inference=inference)
    index = WritableIndex(root, student.segmenter({}, max_side), dtype, Origin("tiny"))
    index.add(scan_all([str(photos)], root, show=False, whole_names=True), show=False)


@pytest.mark.parametrize(
    ("max_side", "inference"),
    [
        (None, {}),
        (100, {"attention": "windowed", "patch_fit": "paper"}),
        (None, {"inference": "sliding", "stride": 16}),
    ],
)
def test_labels_are_those_of_the_segmenter_from_the_same_features(
    max_side: int | None, inference: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    build(tmp_path, photos, max_side=max_side, **inference)
    index = FeatureIndex(tmp_path)
    files = ["0.png", "1.png", "2.png", "more/side.jpg"]
    assert index.names == files
    segmenter = load_student("tiny", inference=inference).segmenter(CLASSES, max_side)
    for i, file in enumerate(files):
        assert torch.equal(index.features(i), segmenter.features(photos / file))
        if segmenter.windows is None:  # with windows, the segmenter stitches similarities at pixels
            expected = segmenter(photos / file)
            labels = index.labels(i, CLASSES)
            assert torch.equal(labels, expected) and tuple(labels.shape) == index.size(i)
            assert torch.equal(index.labels(i, CLASSES, dtype=torch.uint8), expected.byte())
    assert index.size(3) == (120, 64)
    assert max(index.preview(3).shape) == (max_side or 120)


def test_a_refinement_of_the_network_is_applied(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, photos)
    index = FeatureIndex(tmp_path)
    plain = index.labels(0, CLASSES)
    refined = load_student("tiny", inference={"refine": LPOSS("pretrained")})
    index.__dict__["student"] = refined
    assert torch.equal(index.labels(0, CLASSES), refined.segmenter(CLASSES)(photos / "0.png"))
    assert not torch.equal(index.labels(0, CLASSES), plain)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_smaller_types_change_few_pixels(dtype: Dtype, photos: Path, tmp_path: Path) -> None:
    build(tmp_path, photos, dtype)
    index, segmenter = FeatureIndex(tmp_path), load_student("tiny").segmenter(CLASSES)
    same = [(index.labels(i, CLASSES) == segmenter(photos / f"{i}.png")).float().mean() for i in range(3)]
    assert min(same) > 0.99


def test_areas_rank_the_images(photos: Path, tmp_path: Path) -> None:
    build(tmp_path, photos)
    index = FeatureIndex(tmp_path)
    areas = list(index.areas(CLASSES))
    assert len(areas) == 4 and all(row.sum() == pytest.approx(1) for row in areas)
    patches = index.labels(0, CLASSES, size=(9, 16))
    assert areas[0].tolist() == pytest.approx([(patches == c).float().mean().item() for c in range(3)])
    assert torch.equal(next(index.areas(CLASSES, [2])), areas[2])
    rows = [torch.tensor(row) for row in ([0.5, 0.5], [0.0, 1.0], [0.7, 0.3])]
    assert ranking(rows, 0, 5) == [2, 0] and ranking(rows, 1, 2) == [1, 0]


def test_new_images_are_added_and_unreadable_ones_are_listed(tmp_path: Path) -> None:
    photos, root = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    Image.fromarray(render(3, 0, 64, 72).image).save(photos / "a.png")
    for i in range(12):  # more than a cache for training accepts
        (photos / f"broken{i:02d}.jpg").write_bytes(b"nothing")
    build(root, photos)
    shards = {path: path.read_bytes() for path in (root / "shards").iterdir()}
    Image.fromarray(render(3, 1, 64, 72).image).save(photos / "b.png")
    build(root, photos)
    index = FeatureIndex(root)
    assert index.names == ["a.png", "b.png"] and len(index.rejected) == 12 and "broken00.jpg" in index.rejected
    assert all(path.read_bytes() == content for path, content in shards.items())


def test_other_settings_and_folders_are_rejected(photos: Path, tmp_path: Path) -> None:
    build(tmp_path / "index", photos)
    with pytest.raises(CacheError, match=r"max_side: cache None, configuration 100\n.*spar index with --out .*index-"):
        build(tmp_path / "index", photos, max_side=100)
    FeatureCache(tmp_path / "cache", {"teacher": "x"})
    with pytest.raises(CacheError, match="is a cache for training, not an index"):
        FeatureIndex(tmp_path / "cache")
    WritableIndex(tmp_path / "empty", load_student("tiny").segmenter({}), "float16", Origin("tiny"))
    with pytest.raises(CacheError, match="contains no complete image"):
        FeatureIndex(tmp_path / "empty")
    with pytest.raises(CacheError, match="does not contain a feature cache or an index"):
        FeatureIndex(tmp_path / "nothing")


def test_other_weights_are_rejected(photos: Path, tmp_path: Path) -> None:
    student = load_student("tiny")
    with torch.no_grad():
        next(student.backbone.parameters()).add_(0.1)
    (tmp_path / "other").mkdir()
    safetensors.write(student, tmp_path / "other")
    build(tmp_path / "index", photos)
    with pytest.raises(UserError, match="are not the weights with which the features"):
        FeatureIndex(tmp_path / "index", weights=tmp_path / "other").labels(0, CLASSES)
