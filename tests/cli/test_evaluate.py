"""Tests of `spar evaluate` on small copies of the bundled benchmarks: counts, resume, processes, reports, errors."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from spar_lightning.cli import main
from spar_lightning.cli.evaluate import separated
from spar_lightning.evaluation import evaluator
from spar_lightning.evaluation.benchmark_config import SHIPPED, read, shipped
from spar_lightning.evaluation.evaluator import count
from spar_lightning.stopping import Stopped
from tests import fake_benchmarks
from tests.any_words import SmallCLIP
from tests.conftest import ROOT, environment
from tests.segmentation.test_similarity import on_canvas

Capture = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("home")


def matrices(out: Path) -> dict[str, NDArray[np.int64]]:
    """Return the confusion matrix of each benchmark."""
    assert not list((out / "counts").glob("*.part-*"))
    return {path.name.split("-")[0]: np.load(path)["matrix"] for path in sorted((out / "counts").glob("*.npz"))}


def sentence(args: list[str], capsys: Capture) -> str:
    """Run a command with invalid input and return its error message."""
    assert main(args) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("backbone", "inference", "limit"),
    [("SmallCLIP", "single", []), pytest.param("AnyWords", "sliding", ["--max_images", "1"], marks=pytest.mark.slow)],
)
def test_all_ten_end_to_end(
    backbone: str,
    inference: str,
    limit: list[str],
    config: Callable[[str], list[str]],
    trees: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    out, images = tmp_path / "out", 1 if limit else 3
    args = ["--benchmarks", "standard10", "--root", str(trees), "--out", str(out), "--inference", inference]
    assert main([*config(backbone), *args, *limit]) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert list(results["benchmarks"]) == list(SHIPPED)
    assert all(row["images"] == images for row in results["benchmarks"].values())
    table = (out / "table.md").read_text()
    assert table.strip() in printed and "| Mean10 " in table and f"| {10 * images} " in table
    assert f"inference: {inference}" in printed and "templates: 1" in printed
    for name, matrix in matrices(out).items():
        hits = matrix.diagonal()
        union = matrix.sum(0) + matrix.sum(1) - hits
        expected = 100 * (hits[union > 0] / union[union > 0]).mean()
        assert results["benchmarks"][name]["mIoU"] == pytest.approx(expected, abs=1e-9)
        lines = (out / "per_class" / f"{name}.csv").read_text().splitlines()
        assert len(lines) == 1 + len(matrix) == 1 + len(read(shipped()[name]).classes)
    page = (out / "report.html").read_text()
    assert all(f'<section id="benchmark-{i + 1}">\n<h2>{name}</h2>' in page for i, name in enumerate(SHIPPED))
    assert (
        page.count('class="enlarge"')
        == 10 * images
        == sum(len(json.loads(path.read_text())["images"]) for path in (out / "gallery").iterdir())
    )
    thresholds = results["benchmarks"]["voc21"]["protocol"]["thresholds"]
    assert (thresholds["area"] is None) == (backbone == "AnyWords")  # MaskCLIP has different thresholds


def by_hand(root: Path, clip: SmallCLIP) -> NDArray[np.int64]:
    """Return the confusion matrix of voc21 with OpenCLIP, computed step by step without this package's evaluation."""
    folder = root / "VOCdevkit" / "VOC2012"
    entries = read(shipped()["voc21"]).classes
    owner = torch.tensor([i for i, entry in enumerate(entries) for _ in entry.names])
    text = F.normalize(clip.encode_text([name for entry in entries for name in entry.names]), dim=-1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (clip.mean, clip.std))
    matrix = np.zeros((21, 21), np.int64)
    for stem in (folder / "ImageSets/Segmentation/val.txt").read_text().split():
        image = torch.from_numpy(np.array(Image.open(folder / "JPEGImages" / f"{stem}.jpg"))).permute(2, 0, 1)
        truth = np.array(Image.open(folder / "SegmentationClass" / f"{stem}.png"))
        factor = min(2048 / max(truth.shape), 672 / min(truth.shape))
        size = [int(side * factor + 0.5) for side in truth.shape]
        pixels = F.interpolate(image[None].float(), size, mode="bilinear").round().clamp(0, 255) / 255
        pixels = F.interpolate((pixels - mean) / std, [round(side / 16) * 16 for side in size], mode="bilinear")
        with torch.no_grad():
            features = F.normalize(clip(pixels)[0], dim=-1)
        cosines = torch.einsum("hwd,qd->qhw", features, text)
        scores = F.interpolate(cosines[None], truth.shape, mode="bilinear")[0]
        scores = (65 * scores).softmax(0)
        scores = torch.stack([scores[owner == c].amax(0) for c in range(21)])  # (21, H, W)
        pixels_of = scores.argmax(0).flatten().bincount(minlength=21)
        for c in range(1, 21):
            if pixels_of[c] <= 0.1 * pixels_of[1:].sum():
                scores[c] *= 0
        predicted = scores.argmax(0)
        predicted[scores.amax(0) < 0.1] = 0
        counted = truth != 255
        np.add.at(matrix, (truth[counted], predicted.numpy()[counted]), 1)
    return matrix


def test_equals_the_protocol_by_hand(
    config: Callable[[str], list[str]], clip: str, trees: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main([*config("SmallCLIP"), "--benchmarks", "voc21", "--root", str(trees), "--out", str(out)]) == 0
    found, expected = matrices(out)["voc21"], by_hand(trees, SmallCLIP(clip))
    assert found.sum(1).tolist() == expected.sum(1).tolist()
    assert (expected > 0).any(0).sum() >= 3  # more than two classes are predicted
    assert abs(found - expected).sum() <= 4  # measured: 0; two pixels, where two classes are equal in fp32


def folder(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """Create a user-defined benchmark in which images are not resized."""
    for i, (height, width) in enumerate(sizes):
        fake_benchmarks.jpg(root / "images" / f"{i}.jpg", fake_benchmarks.image(i, height, width))
        fake_benchmarks.grey_png(root / "labels" / f"{i}.png", fake_benchmarks.labels(i, height, width, [0, 1, 2, 255]))
    classes = [{"label": name, "names": [name, f"{name} thing"]} for name in ("cat", "dog", "hen")]
    (root / "benchmark.yaml").write_text(yaml.safe_dump({"classes": classes}))
    return root


def test_windows_equal_the_protocol_by_hand(config: Callable[[str], list[str]], clip: str, tmp_path: Path) -> None:
    """Windows overlap; one image is smaller than a window."""
    mine = folder(tmp_path / "mine", [(30, 40), (100, 150), (45, 200)])
    args = ["--benchmarks", str(mine), "--inference", "sliding", "--stride", "24", "--out", str(tmp_path / "out")]
    assert main([*config("SmallCLIP"), *args]) == 0
    network, expected = SmallCLIP(clip), np.zeros((3, 3), np.int64)
    text = F.normalize(network.encode_text(["cat", "cat thing", "dog", "dog thing", "hen", "hen thing"]), dim=-1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.mean, network.std))
    for i in range(3):
        image = torch.from_numpy(np.array(Image.open(mine / "images" / f"{i}.jpg"))).permute(2, 0, 1) / 255
        truth = np.array(Image.open(mine / "labels" / f"{i}.png"))
        size = [round(side / 16) * 16 for side in truth.shape]
        pixels = F.interpolate(((image - mean) / std)[None], size, mode="bilinear")[0]
        with torch.no_grad():
            cosines = on_canvas(network, pixels, text, 24)
        scores = F.interpolate(cosines[None], truth.shape, mode="bilinear")[0]
        predicted = scores.unflatten(0, (3, 2)).amax(1).argmax(0).numpy()
        np.add.at(expected, (truth[truth != 255], predicted[truth != 255]), 1)
    found = matrices(tmp_path / "out")["mine"]
    assert found.sum(1).tolist() == expected.sum(1).tolist() and (expected > 0).any(0).all()
    assert abs(found - expected).sum() <= 4  # measured: 0; two pixels, where two classes are equal in fp32


def test_other_labels_are_counted_anew(config: Callable[[str], list[str]], tmp_path: Path, capsys: Capture) -> None:
    mine, out = folder(tmp_path / "mine", [(30, 40)]), tmp_path / "out"
    args = [*config("SmallCLIP"), "--benchmarks", str(mine), "--out", str(out)]
    assert main(args) == 0
    before = matrices(out)["mine"]
    fake_benchmarks.grey_png(mine / "labels" / "0.png", np.full((30, 40), 2))
    assert main(args) == 0
    assert len(list((out / "counts").glob("*.npz"))) == 2
    row = json.loads((out / "results.json").read_text())["benchmarks"]["mine"]
    assert row["images"] == 1 and before[2].sum() < 1200
    lines = (out / "per_class" / "mine.csv").read_text().splitlines()
    assert [line.split(",")[4] for line in lines[1:]] == ["0", "0", "1200"]
    (out / "results.json").write_text("{")
    assert "--out" in sentence(args, capsys)


def stopped(steps: Iterator[None], images: int) -> Iterator[None]:
    """Yield the given number of steps, then stop as by Ctrl-C."""
    yield from islice(steps, images)
    raise Stopped(signal.SIGINT)


def interrupt(args: list[str], images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command and interrupt it after the given number of images."""
    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "SAVE_EVERY", 0.0)
        patch.setattr(evaluator, "count", lambda *given: stopped(count(*given), images))
        assert main(args) == 130


def test_goes_on_where_it_was(
    config: Callable[[str], list[str]], trees: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*config("SmallCLIP"), "--benchmarks", "voc21,ade20k", "--root", str(trees)]
    assert main([*args, "--out", str(tmp_path / "whole")]) == 0

    args += ["--out", str(tmp_path / "parts")]
    capsys.readouterr()
    interrupt(args, 2, monkeypatch)
    assert "To continue, run the same command again" in capsys.readouterr().out

    counted: list[int] = []

    def noted(*given: Any) -> Any:
        for step, _ in enumerate(count(*given)):
            counted.append(step)
            yield

    monkeypatch.setattr(evaluator, "count", noted)
    assert main(args) == 0
    assert len(counted) == 4  # the third image, and three of the other benchmark
    for name, matrix in matrices(tmp_path / "whole").items():
        assert np.array_equal(matrices(tmp_path / "parts")[name], matrix)
    assert main(args) == 0
    assert len(counted) == 4  # nothing is left to do


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [pytest.param([], id="spar"), pytest.param(TORCHRUN, id="torchrun")])
def test_two_processes_count_what_one_counts(
    launcher: list[str],
    config: Callable[[str], list[str]],
    trees: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = [*config("SmallCLIP"), "--benchmarks", "voc21,cityscapes", "--root", str(trees)]
    assert main([*args, "--out", str(tmp_path / "one")]) == 0
    args += ["--out", str(tmp_path / "two")]
    interrupt(args, 2, monkeypatch)  # one of voc21's three images is left, so one of the two processes gets no image
    args += ["--trainer.devices", "2"]
    command = [sys.executable, *launcher, "-m", "spar_lightning", *args]
    env = {**environment(), "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    one, two = matrices(tmp_path / "one"), matrices(tmp_path / "two")
    assert one.keys() == two.keys() == {"voc21", "cityscapes"}
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert json.loads((tmp_path / "two" / "results.json").read_text())["environment"]["processes"] == 2


def test_a_run_is_evaluated_with_its_own_configuration(
    small: list[str], scenes: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert main(["fit", *small, "--data.root", str(scenes), "--trainer.max_epochs", "1", "--run_dir", str(run)]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--weights", str(run)]) == 0
    assert main(["evaluate", "--weights", str(run / "checkpoints" / "last.ckpt"), "--config", str(run / "config.yaml"),
                 "--inference", "sliding"]) == 0  # fmt: skip
    single, sliding = (next(tmp_path.glob(f"runs/evaluate/Tiny-{way}-*/results.json")) for way in ("single", "sliding"))
    found = {name: row["mIoU"] for name, row in json.loads(single.read_text())["benchmarks"].items()}
    after = json.loads((run / "results.json").read_text())[2]["miou"]
    assert found == pytest.approx(after, abs=1e-9)
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(single), str(sliding.parent)]) == 0
    text = capsys.readouterr().out
    assert 'protocol: inference: "single" and "sliding"' in text and "scenes_96" in text and "mean of 2" in text
    assert "differs" in text and "boundary IoU" in text


def test_weights_of_a_library(config: Callable[[str], list[str]], trees: Path, tmp_path: Path, capsys: Capture) -> None:
    torch.manual_seed(7)
    save_file(SmallCLIP().vision_state_dict(), tmp_path / "a.safetensors")
    args = [*config("SmallCLIP"), "--benchmarks", "voc20", "--root", str(trees), "--max_images", "1"]
    released = {f"segmentor.net.model.{name}": t for name, t in load_file(tmp_path / "a.safetensors").items()}
    torch.save({"state_dict": released}, tmp_path / "student.ckpt")
    for name, more in (
        ("a", ["--weights", str(tmp_path / "a.safetensors")]),
        ("b", []),
        ("c", ["--weights", str(tmp_path / "student.ckpt")]),  # layout of the paper's released students
    ):
        assert main([*args, *more, "--out", str(tmp_path / name)]) == 0
    one, other, student = (json.loads((tmp_path / name / "results.json").read_text()) for name in "abc")
    assert student["model"] == one["model"]
    assert one["model"]["weights"] != other["model"]["weights"] and one["benchmarks"]["voc20"]["images"] == 1
    assert one["benchmarks"]["voc20"]["protocol"] == other["benchmarks"]["voc20"]["protocol"]
    text = sentence([*args, "--out", str(tmp_path / "a")], capsys)
    assert "weights: " in text and "--out" in text
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    text = sentence([*args, "--weights", str(tmp_path / "other.safetensors")], capsys)
    assert "other.safetensors" in text


def test_check_says_what_lies_where(trees: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["evaluate", "--check", str(trees)]) == 1
    out = capsys.readouterr().out
    assert "cityscapes  3 of 3 images, 3 of 3 label maps" in out and out.count("images are expected") == 7
    assert "500 images are expected" in out and "missing" not in out
    assert main(["evaluate", "--check", str(trees), "--benchmarks", "context459,context60"]) == 0
    assert capsys.readouterr().out.count("3 of 3 label maps") == 2
    fake_benchmarks.ade20k(tmp_path, [(8, 8), (8, 8)])
    next(tmp_path.rglob("annotations/validation/*1.png")).unlink()
    assert main(["evaluate", "--check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "ade20k      2 of 2 images, 1 of 2 label maps" in out and "without label map: ADE_val_00000001" in out
    assert "voc21       is not in" in out and f"{tmp_path}/VOCdevkit/VOC2012/JPEGImages/NAME.jpg" in out
    assert all(f"spar evaluate --prepare {what} --root {tmp_path}" in out for what in ("context", "ade847"))


def test_refusals(config: Callable[[str], list[str]], tmp_path: Path, capsys: Capture) -> None:
    args, mine = config("AnyWords"), folder(tmp_path / "mine", [(9, 9)])
    text = sentence([*args, "--benchmarks", "standard8", "--root", str(tmp_path)], capsys)
    assert text.count(" is not in ") == 8 and "--check" in text
    assert "paper6" in sentence([*args, "--benchmarks", "all", "--root", str(tmp_path)], capsys)
    assert "voc21" in sentence(["evaluate", "--check", str(tmp_path), "--benchmarks", "mine"], capsys)
    assert "--benchmarks" in sentence(args, capsys)
    assert "--check" in sentence(["evaluate", "--check", str(tmp_path / "no")], capsys)
    assert "context" in sentence(["evaluate", "--prepare", "contest", "--root", str(tmp_path)], capsys)
    elsewhere = ["evaluate", "--check", str(tmp_path), "--benchmarks", str(tmp_path / "voc21.yaml")]
    assert "voc21.yaml" in sentence(elsewhere, capsys)
    assert "as downloaded" in sentence(["evaluate", "--prepare", "coco_stuff", "--root", str(tmp_path)], capsys)
    for what, folder_name in (("context60", "JPEGImages"), ("ade847", "images/ADE/validation")):
        assert folder_name in sentence(["evaluate", "--prepare", what, "--root", str(tmp_path)], capsys)
    assert "results.json" in sentence(["evaluate", "--compare", str(tmp_path), str(tmp_path)], capsys)
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--compare", "a", "b", "--root", "c"])
    assert "--compare: error: unrecognized arguments: --root c" in capsys.readouterr().err
    assert "stride" in sentence([*args, "--stride", "0"], capsys)
    assert "--weights" in sentence([*args, "--benchmarks", str(mine), "--weights", str(tmp_path)], capsys)
    assert "--max_images" in sentence([*args, "--benchmarks", "paper6", "--max_images", "0"], capsys)


def test_commas_in_paths(config: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert separated(" voc21, ade20k,") == ["voc21", "ade20k"] and separated(None) == []
    monkeypatch.chdir(tmp_path)
    save_file(SmallCLIP().vision_state_dict(), "lr=0.1,wd=0.2.safetensors")
    folder(Path("a,b"), [(9, 9)])
    args = ["--benchmarks", "a,b", "--weights", "lr=0.1,wd=0.2.safetensors", "--out", "out"]
    assert main([*config("SmallCLIP"), *args]) == 0
    assert list(json.loads(Path("out/results.json").read_text())["benchmarks"]) == ["a,b"]


def test_a_set_without_a_counted_pixel(config: Callable[[str], list[str]], tmp_path: Path, capsys: Capture) -> None:
    mine, out = folder(tmp_path / "mine", [(9, 9)]), tmp_path / "out"
    fake_benchmarks.grey_png(mine / "labels" / "0.png", np.full((9, 9), 255))
    assert "mine" in sentence([*config("AnyWords"), "--benchmarks", str(mine), "--out", str(out)], capsys)
    assert not (out / "results.json").exists()
