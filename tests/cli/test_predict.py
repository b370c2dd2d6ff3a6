"""Tests of `spar predict`: each file in a folder gets a result or a message, never a traceback."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

import spar_lightning as spar
from spar_lightning.cli import main
from spar_lightning.cli.blocks import block_bar
from spar_lightning.cli.predict_inputs import image_files
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.visualization.overlay import LONGEST
from spar_lightning.visualization.palette import palette

Capture = pytest.CaptureFixture[str]
Log = pytest.LogCaptureFixture
Predict = Callable[..., int]
SCENE = render(seed=3, index=0, height=48, width=72).image
CLASSES = "red dot; blue dot; background: plain, grain"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images of many formats, damaged images and other files."""
    folder = tmp_path_factory.mktemp("odd")
    scene, exif = Image.fromarray(SCENE), Image.Exif()
    exif[0x112] = 6
    for name, image in {"a.jpg": scene, "a.png": scene, "grey.png": scene.convert("L"), "w.webp": scene,
                        "alpha.png": scene.convert("RGBA"), "one.png": scene.resize((1, 1)),
                        "sixteen.png": Image.fromarray(SCENE[..., 0].astype(np.uint16) * 257),
                        "long.jpg": scene.resize((8000, 500))}.items():  # fmt: skip
        image.save(folder / name)
    scene.save(folder / "exif.jpg", exif=exif)
    (folder / "sub").mkdir()
    scene.save(folder / "sub" / "a.jpg")
    (folder / "corrupt.jpg").write_bytes((folder / "a.jpg").read_bytes()[:900])
    (folder / "fake.png").write_text("hello")
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden.png").write_text("hello")
    return folder


@pytest.fixture
def predict(tmp_path: Path) -> Predict:
    """Return a function that runs `spar predict` with the pretrained Tiny and one prompt per class name."""
    config = tmp_path / "tiny.yaml"
    config.write_text("model: {backbone: spar_lightning.backbones.Tiny, templates: ['{}'], stride: 32}\n")

    def run(*args: str | Path) -> int:
        return main(["predict", *map(str, args), "--weights", "tiny", "--config", str(config), "--out",
                     str(tmp_path / "out")])  # fmt: skip

    return run


def names(folder: Path) -> list[str]:
    """Return the relative paths of all files in a folder, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


def test_every_image_has_a_result_or_a_line(odd: Path, predict: Predict, tmp_path: Path, capsys: Capture) -> None:
    assert predict(odd, "--classes", CLASSES, "--max_side", "400") == 1
    done, out = capsys.readouterr(), tmp_path / "out"
    assert "10 images done" in done.out and "notes.txt" in done.out
    assert "corrupt.jpg" in done.err
    assert "fake.png" in done.err
    expected = ["a.jpg.png", "a.png.png", "alpha.png", "exif.png", "grey.png", "long.png", "one.png", "sixteen.png",
                "sub/a.png", "w.png"]  # fmt: skip
    assert names(out / "labels") == names(out / "overlays") == expected
    sizes = {name: Image.open(out / "labels" / name).size for name in expected}
    assert sizes == {
        **dict.fromkeys(expected, (72, 48)),
        "exif.png": (48, 72),
        "one.png": (1, 1),
        "long.png": (8000, 500),
    }


def test_label_maps_are_the_segmenters_in_the_colours_of_the_run(odd: Path, predict: Predict, tmp_path: Path) -> None:
    assert predict(odd / "a.png", odd / "grey.png", "--classes", CLASSES) == 0
    out = tmp_path / "out"
    segmenter = spar.load("tiny", CLASSES, templates=["{}"])
    classes = json.loads((out / "classes.json").read_text(encoding="utf-8"))
    assert [row["label"] for row in classes] == ["red dot", "blue dot", "background"]
    assert classes[2]["names"] == ["plain", "grain"]
    for name in ("a", "grey"):
        picture = Image.open(out / "labels" / f"{name}.png")
        assert np.array_equal(np.array(picture), segmenter(odd / f"{name}.png").numpy())
        colours = np.array(picture.convert("RGB"))[np.array(picture) == 2]
        assert (colours == palette(3)[2]).all() and classes[2]["colour"] == palette(3)[2].tolist()


def test_scores_features_and_colours(odd: Path, predict: Predict, tmp_path: Path) -> None:
    assert predict(odd / "sub", "--classes", CLASSES, "--scores", "--features", "--pca") == 0
    out = tmp_path / "out"
    scores = np.load(out / "scores" / "a.npz")
    assert scores["scores"].shape == (3, 48, 72) and scores["labels"].tolist() == ["red dot", "blue dot", "background"]
    # Two scores can be equal in half precision.
    assert (scores["scores"].argmax(0) == np.array(Image.open(out / "labels" / "a.png"))).mean() > 0.999
    with safe_open(out / "features" / "a.safetensors", "np") as file:
        assert file.get_tensor("features").shape == (6, 9, 128)
        assert file.metadata()["height"] == "48" and file.metadata()["weights"] == "tiny"
    assert min(Image.open(out / "pca" / "a.png").size) > 100


def test_features_need_no_classes(odd: Path, predict: Predict, tmp_path: Path) -> None:
    assert predict(f"{odd}/s*/*.jpg", "--features", "--inference", "sliding", "--stride", "16") == 0
    assert names(tmp_path / "out") == ["classes.json", "features/a.safetensors"]


def test_a_thousand_unicode_classes(
    odd: Path, config: Callable[[str], list[str]], tmp_path: Path, home: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "classes.txt"
    text.write_text("\n".join(f"clase № {i} 猫" for i in range(1000)), encoding="utf-8")
    yaml, out = config("AnyWords")[-1], tmp_path / "out"
    assert main(["predict", str(odd / "a.png"), "--weights", "tiny", "--config", yaml, "--classes", str(text),
                 "--out", str(out)]) == 0  # fmt: skip
    labels = np.array(Image.open(out / "labels" / "a.png"))
    assert labels.shape == (48, 72) and labels.dtype == np.uint16 and 255 < labels.max() < 1000
    assert len(json.loads((out / "classes.json").read_text(encoding="utf-8"))) == 1000


def test_one_class_is_a_result_with_a_remark(odd: Path, predict: Predict, tmp_path: Path, capsys: Capture) -> None:
    assert predict(odd / "a.png", "--classes", "red dot", "--refine", "LPOSS") == 0
    assert "one class" in capsys.readouterr().err
    assert not np.array(Image.open(tmp_path / "out" / "labels" / "a.png")).any()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--classes", "red dot;;blue dot"], "number 2 of 3"),
        (["--classes", "red dot; red dot"], "label 'red dot'"),
        (["--classes", "no.txt"], "--classes no.txt: file not found"),
        ([], "--classes"),
        (["--classes", "red dot", "--max_side", "0"], "max_side"),
        (["--classes", "red dot", "--model.backbone.size", "3"], "'size' is not accepted"),
    ],
)
def test_mistakes_are_sentences(args: list[str], sentence: str, odd: Path, predict: Predict, capsys: Capture) -> None:
    assert predict(odd / "a.png", *args) == 2
    assert sentence in capsys.readouterr().err


def test_an_unknown_option(odd: Path, predict: Predict, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit:
        predict(odd / "a.png", "--classes", "red dot", "--clases", "x")
    assert exit.value.code == 2 and "mean classes" in capsys.readouterr().err


def test_places_without_images(odd: Path, predict: Predict, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    for place, sentence in (
        (tmp_path / "empty", "empty"),
        (tmp_path / "no", "No file, folder or glob pattern matches"),
        ("no*.jpg", "no*.jpg"),
    ):
        assert predict(place, "--classes", "red dot") == 2
        assert sentence in capsys.readouterr().err
    assert predict(odd / "notes.txt", "--classes", "red dot") == 1  # passed by name, so it is read despite its suffix


def test_results_are_no_images_to_read(odd: Path, predict: Predict, tmp_path: Path, capsys: Capture) -> None:
    shutil.copy(odd / "a.png", tmp_path / "a.png")
    for _ in range(2):  # the second time, the results in --out are inside the folder and are skipped
        assert predict(tmp_path, "--classes", "red dot") == 0
        assert "1 image done" in capsys.readouterr().out
    assert predict(tmp_path / "out" / "labels" / "a.png", "--classes", "red dot") == 2
    assert "--out" in capsys.readouterr().err
    assert predict(tmp_path / "a.png", "--classes", "blue dot") == 2
    assert "classes.json" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    assert predict(tmp_path / "a.png", "--classes", "red dot") == 2
    assert "cannot write" in capsys.readouterr().err


def test_no_two_images_share_a_result(odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "a.png", "a.jpg.png", "b.JPG"):
        shutil.copy(odd / "a.png", folder / name)
    (folder / "doc.pdf").write_text("")
    files, others = image_files([str(folder)], tmp_path / "out")
    assert sorted(map(str, files.values())) == ["a.jpg", "a.jpg.png", "a.png", "b.JPG"]
    assert [path.name for path in others] == ["doc.pdf"]  # Pillow can write but not read this format
    monkeypatch.chdir(folder)
    again, _ = image_files(["b.JPG", str(folder / "b.JPG"), "./b.*"], tmp_path / "out")
    assert again == {Path("b.JPG"): Path("b")}


def test_class_files_of_other_editors(odd: Path, predict: Predict, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "classes.txt"
    text.write_bytes(b"\xef\xbb\xbfred dot\r\nblue dot\r\n")
    assert predict(odd / "a.png", "--classes", text) == 0
    assert [row["label"] for row in json.loads((tmp_path / "out" / "classes.json").read_text())] == [
        "red dot",
        "blue dot",
    ]
    other = tmp_path / "classes.json"
    other.write_text('["red dot", {"name": "blue dot"}]')
    assert predict(odd / "a.png", "--classes", other) == 0
    assert "classes.json: 2 classes, 2 names" in capsys.readouterr().err
    text.write_bytes("gr\u00fcn".encode("latin-1"))
    assert predict(odd / "a.png", "--classes", text) == 2
    assert "UTF-8" in capsys.readouterr().err


def test_scores_beyond_memory_are_a_line(
    odd: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("spar_lightning.cli.predict.MOST", 10_000)
    assert predict(odd / "a.png", "--classes", CLASSES, "--scores") == 1
    assert "scores of 3 classes on 48 x 72 pixels take up to 96.8 kB, more than 10 kB" in capsys.readouterr().err


def test_an_image_beyond_memory_is_a_line(
    odd: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")):
        monkeypatch.setattr(Segmenter, "__call__", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        assert predict(odd / "a.png", "--classes", CLASSES) == 1
        assert "--max_side" in capsys.readouterr().err


def test_out_may_contain_the_images(odd: Path, predict: Predict, tmp_path: Path, capsys: Capture) -> None:
    for place in (tmp_path / "out" / "photos", tmp_path / "out"):
        place.mkdir(exist_ok=True, parents=True)
        shutil.copy(odd / "a.png", place / "b.png")
        for _ in range(2):
            assert predict(place, "--classes", "red dot; blue dot") == 0
        shutil.rmtree(tmp_path / "out")
        capsys.readouterr()


@pytest.mark.parametrize("kind", ["labels", "overlays", "scores", "features", "pca"])
def test_files_of_the_user_are_not_overwritten(
    kind: str, odd: Path, predict: Predict, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "out" / kind / "a.png"
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    for args in (["--classes", "red dot; blue dot"], ["--features"]):
        assert predict(odd / "a.png", *args) == 2
        assert kind in (error := capsys.readouterr().err) and "--out" in error and file.read_text() == "mine"


def test_features_first_and_classes_later(odd: Path, predict: Predict, tmp_path: Path, capsys: Capture) -> None:
    for args in (["--features"], ["--features"], ["--classes", "red dot; blue dot"], ["--features"]):
        assert predict(odd / "a.png", *args) == 0
    assert len(json.loads((tmp_path / "out" / "classes.json").read_text())) == 2
    (tmp_path / "out" / "classes.json").write_bytes(b"\xff\xfe")
    assert predict(odd / "a.png", "--classes", "red dot; blue dot") == 2
    assert "classes.json" in capsys.readouterr().err


def test_one_result_that_cannot_be_written_does_not_end_the_run(
    odd: Path, predict: Predict, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "z.png", "x" * 250 + ".png", os.fsdecode(b"gr\xfcn.png"), "two\nlines.png"):
        shutil.copy(odd / "a.png", folder / name)
    assert (
        predict(folder, "--classes", "red dot; blue dot", "--features", "--scores") == 1
    )  # x..x.safetensors is too long
    said = capsys.readouterr()
    assert "4 images done" in said.out and "xxx" in said.err and "too long" in said.err
    made = {file.name for file in (tmp_path / "out" / "features").iterdir()}
    assert made == {"a.safetensors", "z.safetensors", os.fsdecode(b"gr\xfcn.safetensors"), "two\nlines.safetensors"}


def test_a_full_disk_ends_the_run_with_the_failures(
    odd: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "labels/fake.png")

    monkeypatch.setattr("spar_lightning.cli.predict_outputs.PredictionFolder.write_labels", full)
    assert predict(odd / "corrupt.jpg", odd / "a.png", odd / "a.jpg", "--classes", "red dot; blue dot") == 2
    said = capsys.readouterr()
    assert "0 images done" in said.out and "corrupt.jpg" in said.err and "labels/fake.png" in said.err


@pytest.mark.parametrize("name", ["names.csv", "coco.names", "classes.YAML", "there.lst"])
def test_files_are_not_taken_as_one_class(
    name: str, odd: Path, predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "there.lst":
        Path(name).write_text("red dot\nblue dot\n")
    assert predict(odd / "a.png", "--classes", name) == 2
    assert name in (error := capsys.readouterr().err) and ".txt" in error


def test_the_hint_shows_how_to_separate_classes(odd: Path, predict: Predict, capsys: Capture) -> None:
    assert predict(odd / "a.png", "--classes", "red dot, blue dot, plain") == 0
    assert "'red dot; blue dot; plain'" in capsys.readouterr().err


def test_content_that_is_lost_is_named(odd: Path, predict: Predict, tmp_path: Path, caplog: Log) -> None:
    scene = Image.fromarray(SCENE)
    scene.save(tmp_path / "pages.tif", save_all=True, append_images=[scene])
    Image.fromarray(SCENE[..., 0].astype(np.uint16) * 16).save(tmp_path / "twelve.png")
    assert (
        predict(tmp_path / "pages.tif", tmp_path / "twelve.png", odd / "sixteen.png", "--classes", "red dot; blue dot")
        == 0
    )
    first, second = (record.getMessage() for record in caplog.records)
    assert "pages.tif" in first and "2 pages" in first
    assert "twelve.png" in second and "12 bits" in second


def test_shrunk_images_give_the_same_results(odd: Path, predict: Predict, tmp_path: Path) -> None:
    assert predict(odd / "exif.jpg", odd / "long.jpg", "--classes", CLASSES, "--max_side", "40", "--scores") == 0
    segmenter = spar.load("tiny", classes=CLASSES, max_side=40, templates=["{}"], stride=32)
    for name in ("exif", "long"):
        labels = np.array(Image.open(tmp_path / "out" / "labels" / f"{name}.png"))
        assert np.array_equal(labels, segmenter(odd / f"{name}.jpg").numpy())
    assert Image.open(tmp_path / "out" / "overlays" / "long.png").width == LONGEST
    assert np.load(tmp_path / "out" / "scores" / "exif.npz")["scores"].shape == (3, 72, 48)


def test_blocks(odd: Path, predict: Predict, tmp_path: Path, capsys: Capture) -> None:
    """Images in blocks have the label maps of the segmenter, and a bar with a rate."""
    images = [odd / name for name in ("a.png", "exif.jpg", "one.png", "long.jpg", "sub")]
    options = ("--classes", CLASSES, "--block_size", "64", "--scores", "--features", "--max_side", "600")
    assert predict(*images, *options) == 0
    segmenter = spar.load("tiny", CLASSES, config=tmp_path / "tiny.yaml", block_size=64, max_side=600)
    for name, file in {"a": "a.png", "exif": "exif.jpg", "one": "one.png", "long": "long.jpg"}.items():
        found = np.array(Image.open(tmp_path / "out" / "labels" / f"{name}.png"))
        assert np.array_equal(found, segmenter(odd / file).numpy())
    assert (tmp_path / "out" / "overlays" / "long.png").exists()
    with safe_open(tmp_path / "out" / "features" / "long.safetensors", "numpy") as file:
        assert file.get_tensor("features").shape == (5, 75, 128)
    assert predict(odd / "corrupt.jpg", odd / "a.png", "--classes", CLASSES, "--block_size", "64") == 1
    assert "corrupt.jpg" in capsys.readouterr().err


def test_the_bar_counts_blocks(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    class Shown(tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "disable": False, "mininterval": 0})

    monkeypatch.setattr("spar_lightning.cli.blocks.tqdm", Shown)
    segmenter = spar.load("tiny", block_size=64)
    assert segmenter.blocks is not None
    count = segmenter.blocks.count(96, 144)
    with block_bar(segmenter, count, "a.png"):
        segmenter.features(SCENE.repeat(2, 0).repeat(2, 1))
    segmenter.features(SCENE)  # is not counted
    last = capsys.readouterr().err.split("\r")[-3:]
    assert count == 6 and any("a.png: 100%" in line and "6/6" in line and "block/s" in line for line in last)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--block_size", "0"], "block_size must be at least 1"),
        (["--block_size", "63"], "block_size 63 is smaller than the images of 64 pixels"),
        (["--block_size", "64", "--inference", "sliding"], "inference is sliding"),
        (["--block_size", "64", "--pca"], "--pca compares networks on whole images"),
        (["--block_size", "64", "--refine", "LPOSS"], "block_size cannot be combined with refine"),
    ],
)
def test_mistakes_with_blocks(args: list[str], sentence: str, odd: Path, predict: Predict, capsys: Capture) -> None:
    assert predict(odd / "a.png", "--classes", CLASSES, *args) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("option", ["block_size", "max_side"])
def test_a_value_that_is_not_a_number(option: str, odd: Path, predict: Predict, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        predict(odd / "a.png", "--classes", CLASSES, f"--{option}", "large")
    assert f"{option}: got 'large'. Allowed: a whole number or null." in capsys.readouterr().err


def test_features_beyond_memory_are_a_line(
    odd: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("spar_lightning.cli.predict.MOST", 10_000)
    assert predict(odd / "a.png", "--features", "--block_size", "64") == 1
    assert "features of 6 x 9 patches take up to 27.6 kB, more than 10 kB" in capsys.readouterr().err
