"""Tests of `spar index` and `spar query`: results, a second start, unreadable images, and errors."""

import csv
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spar_lightning import backbones
from spar_lightning.cli import main
from spar_lightning.datasets.scene_renderer import render
from spar_lightning.export import safetensors
from spar_lightning.segmentation.segmenter import Segmenter
from spar_lightning.student import load_student

Capture = pytest.CaptureFixture[str]
NAMES = [*(f"{i}.png" for i in range(5)), "more/5.png"]
CLASSES = "red dot; blue dot; rest: plain, grain, waves, checks"


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with six images, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i in range(6):
        place = folder / "more" if i == 5 else folder
        Image.fromarray(render(3, i, 64 + 8 * i, 96).image).save(place / f"{i}.png")
    return folder


@pytest.fixture
def spar(capsys: Capture) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command and returns exit code, stdout and stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        try:
            code = main(args)
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return run


Run = Callable[..., tuple[int, str, str]]


@pytest.mark.usefixtures("photos")
def test_query_equals_predict(spar: Run, tmp_path: Path) -> None:
    code, out, _ = spar("index", "photos", "--weights", "tiny", "--out", "idx", "--dtype", "float32")
    assert code == 0 and "6 images to do, 0 done" in out and "6 images in idx" in out
    code, out, _ = spar("query", "idx", "--classes", CLASSES, "--out", "found", "--all")
    assert code == 0 and "6 segmentation maps and areas.csv in found\n6 images searched" in out
    assert spar("predict", "photos", "--weights", "tiny", "--classes", CLASSES, "--out", "predicted")[0] == 0
    names = sorted(path.relative_to("predicted/labels") for path in Path("predicted/labels").rglob("*.png"))
    assert len(names) == 6 and names[-1] == Path("more/5.png")
    for name in names:
        mine, theirs = (np.array(Image.open(folder / "labels" / name)) for folder in map(Path, ("found", "predicted")))
        assert np.array_equal(mine, theirs) and Path("found/overlays", name).exists()
    header, *rows = csv.reader(Path("found/areas.csv").read_text().splitlines())
    assert header == ["image", "red dot", "blue dot", "rest"] and [row[0] for row in rows] == [
        *(f"{i}.png" for i in range(5)),
        "more/5.png",
    ]
    assert all(sum(map(float, row[1:])) == pytest.approx(100, abs=0.02) for row in rows)
    code, out, _ = spar("query", "idx", "--classes", CLASSES, "--top", "2")
    largest = max(rows, key=lambda row: float(row[1]))
    assert code == 0 and f"| red dot  | {largest[0]} " in out and out.count("| rest ") == 2


def test_a_second_start_adds_new_images(spar: Run, photos: Path) -> None:
    args = ("index", "photos", "--weights", "tiny", "--out", "idx")
    (photos / "broken.jpg").write_bytes(b"nothing")
    code, out, _ = spar(*args)
    assert code == 1 and "6 images in idx\n1 images cannot be read:\n  broken.jpg: " in out
    Image.fromarray(render(3, 9, 64, 72).image).save(photos / "new.png")
    code, out, _ = spar(*args)
    assert code == 1 and "1 images to do, 7 done" in out and "7 images in idx" in out
    code, out, err = spar("query", "idx", "--classes", CLASSES)
    assert code == 0 and "7 images searched" in out and "1 other images could not be read" in err


@pytest.mark.usefixtures("photos")
def test_results_among_the_images_and_images_with_one_stem(spar: Run, photos: Path) -> None:
    Image.open(photos / "0.png").save(photos / "0.jpg")
    (photos / "notes.txt").write_text("x")
    code, out, _ = spar("index", "photos", "--weights", "tiny", "--out", "idx")
    assert (
        code == 0 and "7 images in idx\n1 other files without the suffix of an image were skipped, such as notes" in out
    )
    for place in ("idx", "idx/found", "photos/found"):
        code, _, err = spar("query", "idx", "--classes", CLASSES, "--out", place)
        assert code == 2 and "Pass a folder outside the index" in err
    assert spar("query", "idx", "--classes", CLASSES, "--out", "found", "--all")[0] == 0
    found = sorted(path.name for path in Path("found/labels").glob("*.png"))
    assert found == ["0.jpg.png", *(f"{i}.png.png" for i in range(5))]


@pytest.mark.usefixtures("photos")
def test_an_image_that_cannot_be_stored_and_one_that_is_too_large(spar: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Segmenter.features

    def one_overflows(self: Segmenter, pixels: Tensor) -> Tensor:
        return features(self, pixels) * (1e9 if pixels.shape[-2] == 72 else 1)

    def too_large(self: Segmenter, pixels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Segmenter, "features", one_overflows)
    code, out, _ = spar("index", "photos", "--weights", "tiny", "--out", "idx")
    assert code == 1 and "5 images in idx" in out and "1.png: The features of 1.png exceed the range of float16" in out
    monkeypatch.setattr(Segmenter, "features", too_large)
    code, _, err = spar("index", "photos", "--weights", "tiny", "--out", "other")
    assert code == 2 and "too large for the memory of cpu" in err and "--max_side" in err


def test_an_unfinished_index(spar: Run, photos: Path) -> None:
    assert spar("index", "photos", "--weights", "tiny", "--out", "idx")[0] == 0
    Image.fromarray(render(3, 9, 64, 72).image).save(photos / "new.png")
    assert spar("index", "photos", "--weights", "tiny", "--out", "idx")[0] == 0
    Path("idx/shards/00001.h5").unlink()
    code, out, err = spar("query", "idx", "--classes", CLASSES)
    assert code == 0 and "6 images searched" in out and "1 images have no features yet. Run spar index again" in err
    shutil.rmtree("idx/shards")
    code, _, err = spar("query", "idx", "--classes", CLASSES)
    assert code == 2 and "was not copied completely" in err


@pytest.mark.usefixtures("photos")
def test_arguments_of_the_backbone_are_found_from_another_folder(
    spar: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(Path(backbones.__path__[0]) / "tiny.safetensors", tmp_path / "w.safetensors")
    pretrained = ("--model.backbone.pretrained", "w.safetensors")
    assert spar("index", "photos", "--weights", "tiny", *pretrained, "--out", "idx")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert spar("query", "../idx", "--classes", CLASSES)[0] == 0
    (tmp_path / "w.safetensors").rename(tmp_path / "moved.safetensors")
    moved = ("--model.backbone.pretrained", "../moved.safetensors")
    assert spar("query", "../idx", "--classes", CLASSES)[0] == 2
    assert spar("query", "../idx", "--classes", CLASSES, *moved)[0] == 0


@pytest.mark.usefixtures("photos")
def test_names_in_a_tar_file_stay_in_the_folder_of_results(spar: Run, tmp_path: Path) -> None:
    with tarfile.open("a.tar", "w") as tar:
        for name in ("../../evil.png", "/tmp/absolute.png", "plain.png"):
            content = Path("photos/0.png").read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert spar("index", "a.tar", "--weights", "tiny", "--out", "idx")[0] == 0
    assert spar("query", "idx", "--classes", CLASSES, "--out", "sub/out", "--all")[0] == 0
    written = sorted(str(path.relative_to("sub/out")) for path in Path("sub").rglob("*.png"))
    names = ["evil.png", "plain.png", "tmp/absolute.png"]
    assert written == [f"{kind}/{name}" for kind in ("labels", "overlays") for name in names]
    assert not list(tmp_path.glob("*.png"))


def test_weights_that_were_moved(spar: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    safetensors.write(load_student("tiny"), tmp_path / "export")
    assert spar("index", str(photos), "--weights", "export", "--out", "idx")[0] == 0
    Path("export").rename("moved")
    code, _, err = spar("query", "idx", "--classes", CLASSES)
    assert code == 2 and "are not in" in err and "--weights" in err
    assert spar("query", "idx", "--classes", CLASSES, "--weights", "moved")[0] == 0


@pytest.mark.usefixtures("photos")
def test_errors(spar: Run) -> None:
    for args, message in (
        (["index", "nothing", "--weights", "tiny", "--out", "idx"], "No folder or tar file named 'nothing'"),
        (["index", "photos", "--weights", "tiny", "--out", "idx", "--dtype", "int4"], "dtype: got 'int4'"),
        (["index", "photos", "--weights", "tiny", "--out", "idx", "--max_side", "0"], "max_side must be at least 1"),
        (["index", "photos", "--weights", "tiny"], "required: out"),
        (["index", "photos/0.png", "--weights", "tiny", "--out", "idx"], "is a single image. Pass its folder: photos"),
        (["index", "photos", "photos/more", "--weights", "tiny", "--out", "idx"], "is one of several folders"),
        (["query", "photos", "--classes", "a; b"], "photos does not contain a feature cache or an index"),
        (["query", "idx", "--classes", "a; b", "--all"], "--all needs a folder"),
        (["query", "idx", "--classes", "a; b", "--top", "-1"], "--top must be at least 0"),
        (
            ["query", "idx", "--classes", "a; b", "--config", "quickstart"],
            "--config describes the network",
        ),
    ):
        code, _, err = spar(*args)
        assert code == 2 and message in err, err
    assert not Path("idx/shards").exists()


@pytest.mark.usefixtures("photos")
def test_blocks(spar: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --block_size, images are not shrunk, large ones are stored in parts, and queries equal predictions."""
    for module in ("build", "parts"):
        monkeypatch.setattr(f"spar_lightning.feature_index.{module}.PART", 20_000)
    Image.fromarray(render(3, 8, 1100, 64).image).save("photos/large.png")
    options = ("--weights", "tiny", "--block_size", "64")
    code, out, err = spar("index", "photos", *options, "--out", "idx", "--dtype", "float32")
    assert "part/s" in err
    assert code == 0 and "7 images to do (58 of their 58 parts), 0 done" in out and "7 images in idx" in out
    code, out, _ = spar("index", "photos", *options, "--out", "idx", "--dtype", "float32")
    assert code == 0 and "0 images to do, 7 done" in out
    assert spar("query", "idx", "--classes", CLASSES, "--out", "found", "--all")[0] == 0
    assert spar("predict", "photos", *options, "--classes", CLASSES, "--out", "predicted")[0] == 0
    names = sorted(path.relative_to("predicted/labels") for path in Path("predicted/labels").rglob("*.png"))
    assert len(names) == 7
    for name in names:
        mine, theirs = (np.array(Image.open(folder / "labels" / name)) for folder in map(Path, ("found", "predicted")))
        assert np.array_equal(mine, theirs)
    code, _, err = spar("index", "photos", "--weights", "tiny", "--block_size", "80", "--out", "idx")
    assert code == 2 and "block_size" in err
    code, _, err = spar("index", "photos", *options, "--inference", "sliding", "--out", "other")
    assert code == 2 and "inference is sliding" in err
