"""Tests of `spar probe`: real folder layouts, seeds, errors."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from spar_lightning.cli import main, probe_knn
from spar_lightning.datasets.scene_renderer import CLASSES, render
from spar_lightning.errors import UserError
from spar_lightning.probes.linear import LinearProbe
from spar_lightning.probes.report import ProbeReport
from tests import fake_benchmarks

Probe = Callable[..., str]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a benchmark of 5 scenes in val/, and 10 others in train/."""
    root = tmp_path_factory.mktemp("probe")
    for split, count in (("val", 5), ("train", 10)):
        for i in range(count):
            scene = render(7, i + 100 * (split == "train"), 64, 72)
            for kind, pixels in (("images", scene.image), ("labels", scene.labels)):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / split / kind / f"{i}.png")
    describe(root / "benchmark.yaml", train={"val/": "train/"})
    return root


def describe(path: Path, **more: Any) -> Path:
    """Write the YAML file of a benchmark with the images in val/."""
    content = {
        "classes": [{"label": name, "names": [name]} for name in CLASSES],
        "images": "val/images/{}.png",
        "labels": [{"file": "val/labels/{}.png"}],
    }
    path.write_text(yaml.safe_dump({**content, **more}))
    return path


@pytest.fixture
def probe(capsys: Capture) -> Probe:
    """Return a function that runs `spar probe knn` and returns what it prints, or its error."""

    def run(*args: object, code: int = 0) -> str:
        given = ["--weights", "tiny", "--num_workers", "0", *map(str, args)]
        try:
            found = main(["probe", "knn", *given])
        except SystemExit as exit:
            found = int(exit.code or 0)
        printed = capsys.readouterr()
        assert found == code, printed.err
        return printed.err.strip().splitlines()[-1] if code else printed.out

    return run


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def test_results_of_several_seeds(scenes: Path, tmp_path: Path, probe: Probe) -> None:
    drawn = ("--benchmark", scenes, "--out", tmp_path, "--train_fraction", 0.5, "--memory_patches", 200)
    probe(*drawn, "--seeds", 1)
    first = results(tmp_path)["seeds"]["0"]
    assert first["training images"] == 5 and first["training patches"] == 200 and first["images"] == 5
    assert first["mIoU"] == pytest.approx(np.mean([v for v in first["per_class"].values() if v is not None]))
    assert first["mIoU"] > 15  # chance: below 8
    table = probe(*drawn, "--seeds", 2)
    content = results(tmp_path)
    second = content["seeds"]["1"]
    assert content["seeds"]["0"] == first and second["mIoU"] != first["mIoU"]  # the first one is not computed again
    assert content["mean"]["mIoU"] == pytest.approx((first["mIoU"] + second["mIoU"]) / 2)
    assert content["std"]["mIoU"] == pytest.approx(abs(first["mIoU"] - second["mIoU"]) / 2**0.5)
    assert f"{content['mean']['mIoU']:.2f}" in table and "standard deviation" in table
    rows = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    assert [row["class"] for row in rows] == list(CLASSES) and {"seed 0", "seed 1"} <= rows[0].keys()
    assert "another probe, network or benchmark" in probe(*drawn[:-4], code=2)
    mapped = describe(scenes / "mapped.yaml", train={"val/": "train/"}, labels=[
        {"file": "val/labels/{}.png", "label_map": {i: min(i, 5) for i in range(len(CLASSES))}}])  # fmt: skip
    shutil.copy(tmp_path / "results.json", tmp_path / "before.json")
    assert "another probe, network or benchmark" in probe("--benchmark", mapped, *drawn[2:], code=2)
    (tmp_path / "results.json").write_text("[1]")
    assert "another probe, network or benchmark" in probe(*drawn, code=2)
    (tmp_path / "results.json").unlink()
    assert "was not written by spar probe" in probe(*drawn, code=2)


def test_inference_and_features_are_part_of_the_result(scenes: Path, tmp_path: Path, probe: Probe) -> None:
    found = {}
    modes: dict[str, list[object]] = {
        "single": [],
        "dense": ["--features", "dense"],
        "windowed": ["--attention", "windowed"],
        "sliding": ["--inference", "sliding", "--stride", 16],
        "compatible": ["--compatible"],
    }
    for name, more in modes.items():
        probe("--benchmark", scenes, "--out", tmp_path / name, *more)
        found[name] = results(tmp_path / name)
    assert len({json.dumps(content["protocol"]) for content in found.values()}) == len(found)
    # At nearly the native size, windows hardly differ from the image; the features of trunk and text space do.
    assert found["single"]["mean"]["mIoU"] != found["dense"]["mean"]["mIoU"]
    plain, other = ([*found[name]["seeds"]["0"]["per_class"].values()] for name in ("single", "compatible"))
    # The reassignment has the largest sum, and absent classes count as 0.
    assert None not in other and sum(other) >= sum(value or 0 for value in plain)


def test_training_images_from_another_folder(
    scenes: Path, tmp_path: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        classes = yaml.safe_load((scenes / "benchmark.yaml").read_text())["classes"]
        (scenes / split / "benchmark.yaml").write_text(yaml.safe_dump({"classes": classes}))
    probe("--benchmark", scenes, "--out", tmp_path / "a")
    probe("--benchmark", scenes / "val", "--train", scenes / "train", "--out", tmp_path / "b")
    a, b = results(tmp_path / "a"), results(tmp_path / "b")
    assert a["seeds"] == b["seeds"]
    monkeypatch.chdir(scenes / "val")
    both = probe("--benchmark", scenes / "val", "--train", "../val", code=2)
    assert "5 images are both in val and in val, such as" in both
    content = yaml.safe_load((scenes / "train" / "benchmark.yaml").read_text())
    content["classes"] = content["classes"][::-1]
    (scenes / "train" / "benchmark.yaml").write_text(yaml.safe_dump(content))
    other = ("--benchmark", scenes / "val", "--train", scenes / "train")
    assert "They must be the same, in the same order" in probe(*other, code=2)


@pytest.mark.parametrize("name", ["voc21", "voc20", "cityscapes", "ade20k"])
def test_bundled_benchmarks_on_their_real_layouts(name: str, tmp_path: Path, probe: Probe) -> None:
    fake_benchmarks.training(tmp_path, [(64, 80), (72, 64)])
    fake_benchmarks.all_ten(tmp_path, [(64, 72), (72, 64)])
    out = tmp_path / "out"
    for more in ([], ["--compatible"]):
        probe("--benchmark", name, "--root", tmp_path, "--out", out / str(len(more)), "--max_images", 1, *more)
    plain, other = (results(out / str(i))["seeds"]["0"] for i in (0, 1))
    assert plain["images"] == 1 and plain["training images"] == 2
    assert other["training patches"] >= plain["training patches"] > 0  # patches without labels are added
    assert len(other["per_class"]) - len(plain["per_class"]) == (name in ("ade20k", "voc20"))


def test_errors(scenes: Path, tmp_path: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    def at(path: Path, *more: object) -> str:
        return probe("--benchmark", path, *more, "--out", tmp_path / "out", code=2)

    missing = describe(scenes / "missing.yaml")
    assert "train is missing, which names the training images" in at(missing)
    assert "replaces nothing" in at(describe(scenes / "same.yaml", train={"nothing": "train"}))
    assert "(training) has no images: no file in" in at(describe(scenes / "none.yaml", train={"val/": "gone/"}))
    (scenes / "val.txt").write_text("0\n")
    (scenes / "train.txt").write_text("\n")
    split = describe(scenes / "split.yaml", split="val.txt", train={"val.txt": "train.txt"})
    assert "train.txt is empty" in at(split)
    assert "does not exist" in at(scenes / "nowhere")
    classes = [{"label": name, "names": [name]} for name in ("a", "b")]
    other = describe(scenes / "other.yaml", classes=classes)
    assert "its classes (a, b, ..) differ" in at(scenes, "--train", other)
    assert "--train_fraction must be above 0" in at(scenes, "--train_fraction", 0)
    assert "--seeds has no effect" in at(scenes, "--seeds", 2)
    assert "less than one patch for each of 10 training images" in at(scenes, "--memory_patches", 9)
    zero = describe(scenes / "zero.yaml", labels=[{"file": "val/labels/{}.png", "reduce_zero_label": True}], classes=[
        {"label": name, "names": [name]} for name in CLASSES])  # fmt: skip
    plain = describe(scenes / "plain.yaml", images="train/images/{}.png", labels=[{"file": "train/labels/{}.png"}])
    assert "reduce_zero_label is true" in at(zero, "--train", plain, "--compatible")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "uses one process, but 2 were started" in at(scenes)
    assert "--memory_patches must be at least 1" in at(scenes, "--memory_patches", 0)
    assert "--k must be at least 1" in at(scenes, "--k", 0)
    assert "fewer than --k 900" in at(scenes, "--k", 900)
    assert "trunk" in at(scenes, "--features", "both")
    monkeypatch.setattr(probe_knn, "available_memory", lambda: 1000)
    assert "The memory bank needs" in at(scenes)
    assert not (tmp_path / "out").exists()


def test_errors_of_label_maps(scenes: Path, tmp_path: Path, probe: Probe) -> None:
    """Also from the processes that read images."""
    describe(scenes / "mine.yaml", train={"val/labels/": "wrong/", "val/images/": "train/images/"})
    (scenes / "wrong").mkdir()
    args = ("--benchmark", scenes / "mine.yaml", "--out", tmp_path / "out", "--num_workers", 1)
    assert "image 0 has no label map. Expected" in probe(*args, code=2)
    for i in range(10):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(scenes / "wrong" / f"{i}.png")
    assert "has shape (8, 8), but its image" in probe(*args, code=2)
    for i in range(10):
        Image.fromarray(np.full((64, 72), 255, np.uint8)).save(scenes / "wrong" / f"{i}.png")
    assert "The training images have 0 patches with labels" in probe(*args, code=2)


def test_the_probe_must_be_named(capsys: Capture) -> None:
    assert main(["probe"]) == 2 and "Pass one of: linear, knn, panoptic" in capsys.readouterr().err
    assert main(["probe", "kn"]) == 2 and "Did you mean knn?" in capsys.readouterr().err


LINEAR = (
    "--weights",
    "tiny",
    "--num_workers",
    0,
    "--accelerator",
    "cpu",
    "--lr",
    1e-2,
    "--batch_size",
    4,
    "--steps",
    6,
)


def linear(capsys: Capture, *args: object, code: int = 0) -> str:
    """Run `spar probe linear` and return what it prints, or its error."""
    try:
        found = main(["probe", "linear", *map(str, (*LINEAR, *args))])
    except SystemExit as exit:
        found = int(exit.code or 0)
    printed = capsys.readouterr()
    assert found == code, printed.err
    return printed.err.strip().splitlines()[-1] if code else printed.out


def head(out: Path) -> dict[str, torch.Tensor]:
    """Return the layer of seed 0."""
    state: dict[str, torch.Tensor] = torch.load(out / "checkpoints" / "seed-0.ckpt", weights_only=True)["state_dict"]
    return state


def test_a_linear_probe_continues_where_it_was_stopped(
    scenes: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--benchmark", scenes, "--check_every", 2)
    linear(capsys, *args, "--out", tmp_path / "a")

    step, seen = LinearProbe.training_step, []

    def counted(self: LinearProbe, *inputs: Any) -> torch.Tensor:
        seen.append(self.trainer.global_step)
        return step(self, *inputs)

    def failing(self: LinearProbe, *inputs: Any) -> torch.Tensor:
        if self.trainer.global_step == 3:
            raise UserError("the power is gone")
        return counted(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(LinearProbe, "training_step", failing)
        assert "the power is gone" in linear(capsys, *args, "--out", tmp_path / "b", code=2)
    assert seen[-1] == 2 and not (tmp_path / "b" / "results.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(LinearProbe, "training_step", counted)
        linear(capsys, *args, "--out", tmp_path / "b")
    assert seen.count(2) == 8 and seen.count(0) == 4  # from the last evaluation, at step 2
    a, b = head(tmp_path / "a"), head(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert results(tmp_path / "a")["seeds"] == results(tmp_path / "b")["seeds"]


def test_a_checkpoint_of_another_probe_is_refused(
    scenes: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--benchmark", scenes, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.delattr(ProbeReport, "add")  # it ends after the last checkpoint and before the result
        with pytest.raises(AttributeError):
            linear(capsys, *args)
    assert "The checkpoint is of another probe" in linear(capsys, *args, "--lr", 1, code=2)
    linear(capsys, *args)
    assert results(tmp_path)["seeds"]["0"]["steps"] == 6


def test_the_interval_of_evaluations_may_change(
    scenes: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 3, after an evaluation at step 2; then one every 4 steps."""
    step, seen = LinearProbe.training_step, []

    def counted(self: LinearProbe, *inputs: Any) -> torch.Tensor:
        seen.append(self.trainer.global_step)
        if self.trainer.global_step == 3 and seen.count(3) == 1:
            raise UserError("the power is gone")
        return step(self, *inputs)

    monkeypatch.setattr(LinearProbe, "training_step", counted)
    args = ("--benchmark", scenes, "--out", tmp_path)
    linear(capsys, *args, "--check_every", 2, code=2)
    linear(capsys, *args, "--check_every", 4)
    assert seen == [*([0] * 4), *([1] * 4), *([2] * 4), 3, *(i for i in range(2, 6) for _ in range(4))]


def test_seeds_that_run_at_once_are_all_stored(tmp_path: Path) -> None:
    one, two = (ProbeReport(tmp_path, {"model": 1}, {}) for _ in range(2))
    two.add(11, {"mIoU": 30.0}, {"a": 30.0})
    one.add(2, {"mIoU": 20.0}, {"a": math.nan})
    assert list(results(tmp_path)["seeds"]) == ["2", "11"] and results(tmp_path)["mean"] == {"mIoU": 25}
    assert (tmp_path / "per_class.csv").read_text().split() == ["class,seed", "2,seed", "11", "a,,30.0000"]


def test_linear_probes_of_several_seeds(scenes: Path, tmp_path: Path, capsys: Capture) -> None:
    args = ("--benchmark", scenes, "--out", tmp_path)
    linear(capsys, *args)
    (tmp_path / "results.json").unlink()
    (tmp_path / "table.md").unlink()
    (tmp_path / "per_class.csv").unlink()
    linear(capsys, *args)  # the checkpoint is that of the last step: only the evaluation is repeated
    first = results(tmp_path)["seeds"]["0"]
    table = linear(capsys, *args, "--seed", 1, "--max_images", 5)
    found = results(tmp_path)["seeds"]
    assert found["0"] == first and found["1"] != first and "standard deviation" in table
    assert linear(capsys, *args) == table  # nothing is left to do


def test_errors_of_a_linear_probe(scenes: Path, tmp_path: Path, capsys: Capture) -> None:
    args = ("--benchmark", scenes, "--out", tmp_path / "out")
    assert "must be a multiple of the number of processes, 3" in linear(capsys, *args, "--devices", 3, code=2)
    fewer = ("--devices", 2, "--max_images", 1)
    assert "1 images for 2 processes" in linear(capsys, *args, *fewer, code=2)
    assert "--steps must be at least 1" in linear(capsys, *args, "--steps", 0, code=2)
    assert "accelerator" in linear(capsys, *args, "--accelerator", "gpu", code=2)
    nothing = describe(scenes / "nothing.yaml", train={"val/labels/": "void/", "val/images/": "train/images/"})
    (scenes / "void").mkdir()
    for i in range(10):
        Image.fromarray(np.full((64, 72), 255, np.uint8)).save(scenes / "void" / f"{i}.png")
    found = linear(capsys, "--benchmark", nothing, "--out", tmp_path / "nothing", code=2)
    assert "the training images have no labeled pixel" in found
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_equal_one(scenes: Path, tmp_path: Path, spar: Callable[..., Any]) -> None:
    for devices in (1, 2):
        out = tmp_path / str(devices)
        args = ("probe", "linear", *LINEAR, "--benchmark", scenes, "--devices", devices, "--out", out)
        done = spar([str(arg) for arg in args])
        assert done.code == 0, done.err
    one, two = head(tmp_path / "1"), head(tmp_path / "2")
    assert all((one[name] - two[name]).abs().max() < 1e-6 for name in one)
    assert results(tmp_path / "1")["seeds"] == results(tmp_path / "2")["seeds"]


def test_panoptic_on_the_real_layouts(
    scenes: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classes of both benchmarks become words that Tiny knows."""
    monkeypatch.setenv("SPAR_CACHE", str(tmp_path / "text"))
    fake_benchmarks.all_ten(tmp_path, [(64, 80), (72, 64)])
    fake_benchmarks.instances(tmp_path)
    for name, counts in {"cityscapes": (4, 8), "ade20k": (2, 2)}.items():
        args = ["--weights", "tests.any_words.AnyWords", "--benchmark", name, "--root", tmp_path, "--size", "native,96"]
        for pooling in ("area", "binary"):
            out = tmp_path / f"{name}-{pooling}"
            given = [*args, "--pooling", pooling, "--out", out, "--num_workers", 0]
            assert main(["probe", "panoptic", *map(str, given)]) == 0
            assert "PQ things" in capsys.readouterr().out
            found = results(out)["sizes"]
            assert list(found) == ["native", "96"] and "mean" not in results(out)
            assert all(row["images"] == 2 and counts[0] <= row["segments"] <= 2 * counts[1] for row in found.values())
            assert all(0 <= row["PQ"] <= 100 for row in found.values())
    stuff = ["--weights", "tiny", "--benchmark", str(scenes), "--out", str(tmp_path / "stuff"), "--max_images", "1"]
    assert main(["probe", "panoptic", *stuff]) == 0
    (row,) = results(tmp_path / "stuff")["sizes"].values()
    assert row["PQ things"] is None and row["PQ"] == row["PQ stuff"] and "nan" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "ade" / "ADEChallengeData2016" / "annotations_instance")
    assert main(["probe", "panoptic", *map(str, [*args, "--out", tmp_path / "out"])]) == 2
    assert "does not exist. Complete the download" in capsys.readouterr().err
    assert main(["probe", "panoptic", *map(str, [*args, "--size", "big"])]) == 2
    assert "--size must be native or numbers of pixels" in capsys.readouterr().err
