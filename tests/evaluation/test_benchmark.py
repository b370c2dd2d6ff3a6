"""Tests of reading benchmarks from the usual folder layouts, and of the errors for invalid benchmarks."""

import os
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
from spar_lightning.evaluation.confusion import ConfusionMatrix
from spar_lightning.evaluation.label_files import LabelFiles
from spar_lightning.evaluation.label_values import class_ids
from tests import fake_benchmarks

CLASSES = [{"label": "round", "names": ["disc", "ring"]}, {"label": "bar", "names": ["bar"]}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump({"classes": CLASSES}))
    for i in range(3):
        Image.fromarray(np.full((4, 6, 3), i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(np.full((4, 6), (0, 1, 255)[i], np.uint8)).save(tmp_path / "labels" / f"{i}.png")
    return tmp_path


def opened(source: Path | str, root: Path | None = None) -> Benchmark:
    benchmark = Benchmark(str(source), None if root is None else str(root))
    benchmark.open()
    return benchmark


def described(folder: Path, **more: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"classes": CLASSES, **more}))
    return path


def test_reads_images_labels_and_classes(folder: Path) -> None:
    benchmark = opened(folder)
    assert benchmark.name == folder.name and len(benchmark) == 3
    assert benchmark.classes == {"round": ("disc", "ring"), "bar": ("bar",)}
    image = benchmark[1]
    assert image.image.shape == (3, 4, 6) and image.labels.unique().tolist() == [1]
    assert benchmark[2].labels.unique().tolist() == [IGNORED]
    assert opened(folder / "benchmark.yaml").name == folder.name


def test_images_are_kept_evenly_spread(folder: Path) -> None:
    benchmark = opened(folder)
    benchmark.keep(None)
    benchmark.keep(5)
    assert benchmark.stems == ["0", "1", "2"]
    benchmark.keep(2)
    assert benchmark.stems == ["0", "1"] and len(benchmark) == 2
    assert benchmark[1].key == "1"


def test_ones_own_layout(folder: Path) -> None:
    (folder / "labels").rename(folder / "masks")
    (folder / "list.txt").write_text("2\n0 \n\n")
    labels = {"file": "masks/{}.png", "label_map": {0: 1, 1: 0}}
    benchmark = opened(described(folder, split="list.txt", images="images/{}.png", labels=[labels], resize=[64, 32]))
    assert benchmark.name == "mine" and benchmark.stems == ["2", "0"]
    assert benchmark[1].labels.unique().tolist() == [1] and benchmark.description.resize == (64, 32)


def test_more_than_255_classes(folder: Path) -> None:
    many = [{"label": str(i), "names": [str(i)]} for i in range(300)]
    path = folder / "many.yaml"
    path.write_text(yaml.safe_dump({"classes": many, "labels": [{"file": "labels/{}.png", "ignored": [65535]}]}))
    Image.fromarray(np.tile(np.array([255, 299, 65535], np.uint16), (4, 2))).save(folder / "labels" / "0.png")
    assert opened(path)[0].labels[0].tolist() == [255, 299, IGNORED] * 2


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (LabelFiles("{}"), [0, 19, 255], [0, 19, IGNORED]),
        (LabelFiles("{}", reduce_zero_label=True), [0, 1, 20, 255], [IGNORED, 0, 19, IGNORED]),
        (LabelFiles("{}", label_map={7: 0, 33: 18}, ignored=[0, 3, 255]), [7, 33, 3, 255], [0, 18, IGNORED, IGNORED]),
        (LabelFiles("{}", ignored=[]), [0, 1], [0, 1]),
        (LabelFiles("{}", label_map={0: 0, 255: 1}), [0, 255], [0, 1]),
    ],
)
def test_label_arithmetic(kind: LabelFiles, values: list[int], expected: list[int]) -> None:
    assert class_ids(np.array([values], np.uint8), kind, 20).tolist() == [expected]


@pytest.mark.parametrize(
    ("kind", "value", "sentence"),
    [
        (LabelFiles("{}"), 20, "20, .* 0 to 19.* 255"),
        # mmsegmentation converts 254 to class 253; only the values 0 and 255 are ignored.
        (LabelFiles("{}", reduce_zero_label=True), 254, "254, .* 1 to 20.* 0, 255"),
        (LabelFiles("{}", label_map={7: 0}), 8, "8, .* label_map"),
    ],
)
def test_values_that_stand_for_no_class(kind: LabelFiles, value: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        class_ids(np.array([[value]], np.uint8), kind, 20)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"classes": []}, "classes"),
        ({"classes": ["a"]}, r"classes: \[\{label: disc"),
        ({"classes": [{"label": "a", "names": "b"}]}, "classes"),
        ({"classes": [{"label": "a", "names": [1]}]}, "classes"),
        ({"classes": [{"label": "a", "names": []}]}, "class 'a'"),
        ({"classes": CLASSES[:1] * 2}, "round"),
        ({"images": "images"}, r"'images' must contain \{\} exactly once"),
        ({"folders": "x"}, "Option 'folders' is not accepted. Allowed keys are classes, folder, images"),
        ({"thresholds": {"probability": 0.1}}, "'round' is not declared as the background"),
        ({"backbone_thresholds": {"OpenCLIP": {"area": 0.1}}}, "'round' is not declared as the background"),
        ({"thresholds": {"area": 2}, "background": True}, "area"),
        ({"resize": [0, 9]}, "resize"),
        ({"labels": [{"file": "{}", "label_map": {}}]}, "label_map"),
        ({"labels": [{"file": "{}", "label_map": {0: 0, 255: 1}, "ignored": [255]}]}, "255 is a class in label_map"),
        ({"labels": [{"file": "{}", "ignored": [1]}]}, "1 is a class, but also in ignored"),
        ({"labels": [{"file": "{}", "reduce_zero_label": True, "ignored": [2]}]}, "2 is a class, but also in ignored"),
        ({"classes": [*CLASSES, {"label": "hoop", "names": ["ring"]}]}, "two classes have the name ring"),
        ({"labels": [{"file": "{}", "label_map": {-1: 0}}]}, "keys must be at least 0"),
        ({"labels": [{"file": "{}", "label_map": {3: 2}}]}, "label_map .*0 to 1"),
        (
            {"labels": [{"file": "{}", "label_map": {3: 1}, "reduce_zero_label": True}]},
            "label_map and reduce_zero_label",
        ),
    ],
)
def test_a_malformed_description(folder: Path, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BenchmarkError, match=f"mine.yaml.*{sentence}"):
        opened(described(folder, **more))


def test_thresholds_of_a_family_and_of_what_derives_from_it(folder: Path) -> None:
    from spar_lightning.backbones import OpenCLIP, SigLIP2

    class Mine(OpenCLIP):
        pass

    path = described(folder, background=True, backbone_thresholds={"OpenCLIP": {"probability": 0.1}})
    description = opened(path).description
    assert [description.thresholds_of(cls).probability for cls in (OpenCLIP, Mine, SigLIP2)] == [0.1, 0.1, 0]


def test_no_such_benchmark(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"'voc22'.*voc21.*voc21, voc20"):
        opened("voc22")


def test_a_benchmark_that_ships_needs_a_root() -> None:
    with pytest.raises(BenchmarkError, match=r"voc21 .*--root.*data\.benchmark_root"):
        opened("voc21")


def test_a_missing_list(tmp_path: Path) -> None:
    fake_benchmarks.voc(tmp_path, [(8, 8)])
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(BenchmarkError, match=r"voc21 .*Segmentation/val\.txt.*--check"):
        opened("voc21", tmp_path)


def test_missing_labels(folder: Path) -> None:
    (folder / "labels" / "2.png").unlink()
    with pytest.raises(BenchmarkError, match=r"labels/2\.png"):
        opened(folder)[2]


def test_labels_of_another_size(folder: Path) -> None:
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(folder / "labels" / "0.png")
    with pytest.raises(BenchmarkError, match=r"labels/0\.png .*\(4, 5\).*images/0\.png .*\(4, 6\)"):
        opened(folder)[0]


def test_a_label_without_class(folder: Path) -> None:
    Image.fromarray(np.full((4, 6), 2, np.uint8)).save(folder / "labels" / "0.png")
    with pytest.raises(BenchmarkError, match=r"labels/0\.png .*\b2\b.*\b2 classes"):
        opened(folder)[0]


@pytest.mark.parametrize("file", ["images/1.png", "labels/1.png"])
def test_a_file_that_cannot_be_read(folder: Path, file: str) -> None:
    (folder / file).write_bytes(b"\x89PNG nothing")
    with pytest.raises(BenchmarkError, match=f"{file}"):
        opened(folder)[1]


def test_a_listed_image_that_is_missing(folder: Path) -> None:
    (folder / "list.txt").write_text("0\n7\n")
    benchmark = opened(described(folder, split="list.txt"))
    with pytest.raises(BenchmarkError, match=r"images/7\.png"):
        benchmark[1]


def test_an_image_in_two_formats(folder: Path) -> None:
    Image.new("RGB", (6, 4)).save(folder / "images" / "0.jpg")
    with pytest.raises(BenchmarkError, match=r"\b0\b.*images/0\.jpg, .*images/0\.png"):
        opened(folder)


def test_suffixes_in_any_case(folder: Path) -> None:
    for name in ("a.JPG", "b.jpeg", "c.Tiff"):
        Image.new("RGB", (6, 4)).save(folder / "images" / name)
        Image.new("L", (6, 4)).save(folder / "labels" / f"{name[0]}.PNG", "png")
    benchmark = opened(folder)
    assert benchmark.stems == ["0", "1", "2", "a", "b", "c"] and benchmark[5].labels.unique().tolist() == [0]
    (folder / "list.txt").write_text("a\n")
    assert opened(described(folder, split="list.txt"))[0].key == "a"
    both = described(folder, images=["images/{}.jpg", "images/{}.JPG"])  # two patterns for the same file
    assert opened(both).stems == ["a"]


def test_files_that_are_left_out_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(**more: Any) -> list[str]:
        caplog.clear()
        opened(described(folder, **more))
        return [record.getMessage() for record in caplog.records]

    assert not said()
    (folder / "images" / "._0.png").touch()  # hidden
    (folder / "images" / "notes.txt").touch()
    assert not said()
    Image.new("RGB", (6, 4)).save(folder / "images" / "a.jpg")
    Image.new("L", (6, 4)).save(folder / "labels" / "b.png")
    first, second = said(images="images/{}.png")
    assert "labels/b.png" in first and "images/a.jpg" in second and "images/{}.png" in second
    (folder / "list.txt").write_text("0\n")
    assert not said(split="list.txt")  # other files are expected there


def test_links_are_followed_once(folder: Path) -> None:
    for name in ("again", "more"):
        (folder / "images" / name).symlink_to(folder / "images", target_is_directory=True)
    assert opened(folder).stems == ["0", "1", "2"]


def _with_exif(folder: Path, orientation: int, upright_labels: bool) -> Path:
    """Write an image with an EXIF orientation whose upper left corner, seen upright, is labeled as class 1."""
    upright = np.zeros((6, 4, 3), np.uint8)
    upright[:2, :2] = 200
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = {3: np.rot90(upright, 2), 6: np.rot90(upright, 1)}[orientation]
    Image.fromarray(np.ascontiguousarray(stored)).save(folder / "images" / "0.png", exif=exif)
    labels = ((upright if upright_labels else stored)[..., 0] > 0).astype(np.uint8)
    Image.fromarray(labels).save(folder / "labels" / "0.png")
    return folder


@pytest.mark.parametrize("orientation", [3, 6])
def test_images_are_turned_upright(folder: Path, orientation: int, caplog: pytest.LogCaptureFixture) -> None:
    benchmark = opened(_with_exif(folder, orientation, upright_labels=True))
    image = benchmark[0]
    assert torch.equal(image.image[0] > 0, image.labels == 1)
    benchmark.digest()
    (said,) = [record.getMessage() for record in caplog.records]
    assert "1 images" in said and "EXIF" in said and "first: 0" in said


def test_labels_that_are_not_upright(folder: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"labels/0\.png .*images/0\.png .*EXIF orientation 6"):
        opened(_with_exif(folder, 6, upright_labels=False))[0]


def test_a_set_without_a_counted_pixel(folder: Path) -> None:
    benchmark, counts = opened(folder), ConfusionMatrix(2)
    counts.update(torch.zeros(4, 6, dtype=torch.long), torch.full((4, 6), IGNORED), 0)
    with pytest.raises(BenchmarkError, match=f"{benchmark.name}.*no pixel.*255"):
        benchmark.results(counts)


def test_names_that_are_not_utf8(folder: Path) -> None:
    for kind in ("images", "labels"):
        (folder / kind / "1.png").rename(folder / kind / os.fsdecode(b"gr\xfcn\n.png"))
    benchmark = opened(folder)
    assert os.fsdecode(b"gr\xfcn\n") in benchmark.stems and len(benchmark.digest()) == 12


def test_another_area(folder: Path) -> None:
    whole = opened(folder)
    small = whole.resized(96)
    assert small.description.resize == 96 != whole.description.resize
    assert small.description.classes == whole.description.classes and len(small) == len(whole)
    assert small.digest() == whole.digest() == opened(folder).digest()
    whole.keep(1)
    assert whole.digest() != small.digest()


def test_what_the_digest_stands_for(folder: Path) -> None:
    digests = [opened(folder).digest()]
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(folder / "labels" / "1.png")
    digests.append(opened(folder).digest())
    path = folder / "images" / "1.png"
    size = path.stat().st_size
    Image.fromarray(np.full((4, 6, 3), 77, np.uint8)).save(path)
    assert path.stat().st_size == size  # the content counts
    digests.append(opened(folder).digest())
    assert len(set(digests)) == 3 and opened(folder).digest() == digests[-1]
    (folder / "images" / "1.png").unlink()
    (folder / "list.txt").write_text("1\n")
    with pytest.raises(BenchmarkError, match=r"images/1\.png"):
        opened(described(folder, split="list.txt")).digest()


def test_cities_behind_links(tmp_path: Path) -> None:
    fake_benchmarks.cityscapes(tmp_path, [(8, 8), (8, 8)])
    city = tmp_path / "cityscapes" / "leftImg8bit" / "val" / "lindau"
    city.rename(tmp_path / "elsewhere")
    city.symlink_to(tmp_path / "elsewhere")
    assert len(opened("cityscapes", tmp_path)) == 2


def test_a_class_file_and_colors(folder: Path) -> None:
    """Names in a text file and label maps in color, as in benchmarks of aerial images."""
    (folder / "cls.txt").write_text("road; street\ntree\n")
    red, green, black = (255, 0, 0), (0, 255, 0), (0, 0, 0)
    kind = {"file": "labels/{}.png", "colors": [red, green], "ignored_colors": [black]}
    for i in range(3):
        colors = np.zeros((4, 6, 3), np.uint8)
        colors[:, :2], colors[:, 2:3] = red, green
        picture = Image.fromarray(colors)
        (picture.quantize(8) if i else picture.convert("RGBA")).save(folder / "labels" / f"{i}.png")
    described(folder, classes="cls.txt", labels=[kind])
    benchmark = opened(folder / "mine.yaml")
    assert benchmark.classes == {"road": ("road", "street"), "tree": ("tree",)}
    expected = torch.tensor([0, 0, 1, IGNORED, IGNORED, IGNORED]).expand(4, 6)
    assert all(torch.equal(benchmark[i].labels, expected) for i in range(3))
    described(folder, classes="cls.txt", labels=[{**kind, "ignored_colors": []}])
    with pytest.raises(BenchmarkError, match=r"0\.png contains the color \[0, 0, 0\]"):
        opened(folder / "mine.yaml")[0]
    grey = np.zeros((4, 6), np.uint8)
    Image.fromarray(grey).save(folder / "labels" / "0.png")
    with pytest.raises(BenchmarkError, match="needs RGB"):
        opened(folder / "mine.yaml")[0]
    Image.fromarray(np.stack([grey] * 3, -1)).save(folder / "labels" / "0.png")
    with pytest.raises(BenchmarkError, match="unless `colors`"):
        opened(described(folder, classes="cls.txt"))[0]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"colors": [[0, 0, 0]]}, "1 colors for 2 classes"),
        ({"colors": [[0, 0, 0], [0, 0, 0]]}, "occurs twice"),
        ({"colors": [[0, 0, 0], [0, 0, 256]]}, "not a color"),
        ({"colors": [[0, 0, 0], [0, 0, 1]], "ignored": [3]}, "Remove them"),
        ({"ignored_colors": [[0, 0, 0]]}, "needs colors"),
    ],
)
def test_invalid_colors(folder: Path, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BenchmarkError, match=sentence):
        opened(described(folder, labels=[{"file": "labels/{}.png", **more}]))
