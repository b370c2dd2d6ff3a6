"""Tests of `spar evaluate --strides` and `--sweep`: points, timings, figures; and refinement on benchmarks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spar_lightning.cli import main
from spar_lightning.cli.evaluate_sweep import network_names
from spar_lightning.evaluation import evaluator
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.evaluation.timing import Timing
from spar_lightning.refinement import LPOSS
from spar_lightning.segmentation.config import InferenceConfig
from spar_lightning.segmentation.segmenter import Segmenter
from tests.any_words import SmallCLIP
from tests.cli.test_evaluate import folder, sentence
from tests.refinement.test_anyup import official_file

pytestmark = pytest.mark.usefixtures("home")
Capture = pytest.CaptureFixture[str]
QUICK = ["--repeats", "2", "--warm_ups", "1"]


@pytest.fixture
def sweep(config: Callable[[str], list[str]], tmp_path: Path) -> list[str]:
    """Return the arguments of a sweep over strides and sizes with one student."""
    mine = folder(tmp_path / "mine", [(80, 120), (30, 40)])
    torch.manual_seed(7)
    save_file(SmallCLIP().vision_state_dict(), tmp_path / "student.safetensors")
    args = ["--benchmarks", str(mine), "--weights", str(tmp_path / "student.safetensors"), "--inference", "sliding"]
    return [*config("SmallCLIP"), *args, "--strides", "64,24", "--sweep", "64,96", *QUICK]


def points(out: Path) -> dict[tuple[str, int | None, int | None], dict[str, Any]]:
    """Return the points by curve, stride and area; single-pass points without an area belong to Figure 1."""
    return {
        (row["curve"], row["stride"], row["area"]): row
        for row in json.loads((out / "sweep.json").read_text())["points"]
    }


def test_both_figures_from_one_command(
    sweep: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main([*sweep, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    found = points(out)
    single, sliding, student = "SmallCLIP, single pass", "SmallCLIP, sliding window", "student, single pass"
    assert set(found) == {
        *((curve, None, area) for curve in (single, student) for area in (None, 64, 96)),
        *((sliding, stride, None) for stride in (64, 24)),
        *((sliding, 64, area) for area in (64, 96)),  # at the stride of the configuration
    }
    for figure in ("strides", "areas"):
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (
            out / f"{figure}.svg"
        ).read_text()
    table = (out / "sweep.md").read_text()
    assert table.strip() in printed and "Figure 1 of the paper" in table and "| 96²" in table
    whole = (out / "sweep.json").read_text()
    first = found[sliding, 24, None]["timings"]["mine"]
    assert (first["size"], first["patches"], first["windows"]) == ([80, 128], 40, 8)  # 2 x 4 windows of 64
    assert first["quartiles"][0] <= first["ms"] <= first["quartiles"][1] and first["memory"] > 1
    assert found[student, None, 96]["timings"]["mine"]["size"] == [80, 112]  # 78.4 x 117.6

    # A separate evaluation gives the same result as the point of the sweep.
    alone = [*sweep[:3], *sweep[3:5], "--inference", "sliding", "--stride", "24", "--out", str(tmp_path / "alone")]
    assert main(alone) == 0
    result = json.loads((tmp_path / "alone" / "results.json").read_text())["benchmarks"]["mine"]["mIoU"]
    assert found[sliding, 24, None]["mIoU"] == {"mine": result}
    assert found[single, None, None]["mIoU"] != found[student, None, None]["mIoU"]

    # Nothing is counted or timed again; points that are no longer requested are removed from the figures.
    with monkeypatch.context() as patch:
        patch.setattr(Timing, "of", None)
        patch.setattr(evaluator, "count", lambda *_: iter(()))
        assert main([*sweep, "--out", str(out)]) == 0
        assert points(out) == found
        fewer = [*sweep[: sweep.index("--strides")], "--strides", "24", *QUICK, "--out", str(out)]
        assert main(fewer) == 0
    left = {(single, None, None), (sliding, 24, None), (student, None, None)}
    assert points(out) == {key: found[key] for key in left}
    (out / "sweep.json").write_text(whole)
    for other_args, words in (
        (["--model.backbone.pretrained", str(tmp_path / "student.safetensors")], "weights: "),
        (["--refine", "LPOSS"], 'refine: null and {"name": "LPOSS"'),
        (["--blend", "hann"], 'blend: null and "hann"'),
        (["--max_images", "1"], "mine: 2 and 1"),
    ):
        text = sentence([*sweep, *other_args, "--out", str(out)], capsys)
        assert words in text and "--out" in text

    other = tmp_path / "other"
    other.mkdir()
    (other / "sweep.json").write_bytes((out / "sweep.json").read_bytes())
    capsys.readouterr()
    assert main(["evaluate", "--figures", str(out), str(other), "--out", str(tmp_path / "both")]) == 0
    files = capsys.readouterr().out.splitlines()
    assert [Path(file).name for file in files] == ["strides.png", "strides.svg", "areas.png", "areas.svg"]
    assert all(Path(file).is_file() for file in files)
    (other / "sweep.json").write_text(whole.replace('"images": 2', '"images": 3'))
    text = sentence(["evaluate", "--figures", str(out), str(other), "--out", str(tmp_path / "both")], capsys)
    assert "mine (2 images, " in text and "mine (3 im" in text
    (tmp_path / "file").touch()
    assert "--out" in sentence(["evaluate", "--figures", str(out), "--out", str(tmp_path / "file")], capsys)


def test_a_stopped_sweep_goes_on(sweep: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, of = tmp_path / "out", Timing.of
    timed: list[Timing] = []

    def stop(*given: Any, **passes: Any) -> Timing:
        if len(timed) == 3:
            raise KeyboardInterrupt
        timed.append(of(*given, **passes))
        return timed[-1]

    monkeypatch.setattr(Timing, "of", stop)
    assert main([*sweep, "--out", str(out)]) == 130
    assert not (out / "sweep.json").exists()  # written only when complete
    monkeypatch.setattr(Timing, "of", of)
    assert main([*sweep, "--out", str(out)]) == 0
    found = points(out)
    assert len(found) == 10
    for done, timing in zip(list(found.values())[:3], timed, strict=True):
        assert done["timings"]["mine"]["ms"] == timing.ms  # not measured again


COMBINATIONS: list[tuple[list[str], LPOSS | None, str | None]] = [
    (["--refine", "LPOSS", "--refine.preset", "spar"], LPOSS("spar"), None),
    ([], None, "anyup"),
    (["--refine", "LPOSS", "--refine.gamma", "3", "--refine.k", "50"], LPOSS(gamma=3.0, k=50), "anyup"),
]


@pytest.mark.parametrize(
    ("options", "refine", "upsampler"),
    [*COMBINATIONS[:2], pytest.param(*COMBINATIONS[2], marks=pytest.mark.slow)],
    ids=["lposs", "anyup", "both"],
)
def test_refinements(
    options: list[str],
    refine: LPOSS | None,
    upsampler: str | None,
    config: Callable[[str], list[str]],
    clip: str,
    trees: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    """Single pass and sliding window, on images with an area of 96 x 96 pixels."""
    file = str(official_file(tmp_path / "anyup.pth"))
    args = [
        *config("SmallCLIP"),
        "--benchmarks",
        "voc21,ade20k",
        "--root",
        str(trees),
        "--inference",
        "sliding",
        "--stride",
        "48",
    ]
    args += ["--sweep", "96", *QUICK, "--out", str(tmp_path / "out")]
    args += options
    args += ["--upsampler", file] if upsampler else []
    assert main(args) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "out" / "sweep.md").read_text().splitlines()[0]
    assert ("LPOSS gamma" in table) == bool(refine) and table.endswith("AnyUp") == bool(upsampler)
    assert ("refine: {'name': 'LPOSS', 'gamma'" in printed) == bool(refine)
    assert ("upsampler: {'name': 'AnyUp'" in printed) == bool(upsampler)
    voc21 = next(line for line in printed.splitlines() if line.startswith("voc21: "))
    assert ("thresholds None" in voc21) == bool(refine)  # MaskCLIP's thresholds apply to similarities
    benchmark = Benchmark("ade20k", str(trees))
    benchmark.open()
    for point in (tmp_path / "out" / "points").iterdir():
        results = json.loads((point / "results.json").read_text())
        assert list(results["benchmarks"]) == ["voc21", "ade20k"]
        inference = results["protocol"]["inference"]
        settings = InferenceConfig(
            inference, 48, templates=["{}"], refine=refine, upsampler=file if upsampler else "bilinear"
        )
        segmenter = Segmenter(SmallCLIP(clip), benchmark.description.names(), settings, resize=96)
        matrix = np.zeros((150, 150), np.int64)
        for i in range(len(benchmark)):
            predicted, labels = segmenter(benchmark[i].image), benchmark[i].labels
            np.add.at(matrix, (labels[labels >= 0], predicted[labels >= 0]), 1)
        assert np.array_equal(np.load(next(point.glob("counts/ade20k-*.npz")))["matrix"], matrix)


def test_names_of_networks() -> None:
    runs = ["Tiny", "runs/lr2e-5_wd0.01", "runs/b/checkpoints/last.ckpt", "other/student.safetensors", "runs/c/"]
    assert list(network_names(runs).values()) == ["Tiny", "lr2e-5_wd0.01", "b", "student", "c"]
    assert network_names(["/d/x/a", "/d/y/a"]) == {"/d/x/a": "x/a", "/d/y/a": "y/a"}
    assert network_names(["Tiny", "runs/Tiny"])["runs/Tiny"] == "runs/Tiny"
    assert list(network_names(["r/a", "r/a/checkpoints/last.ckpt"]).values()) == ["a", "last.ckpt"]


def test_refusals(sweep: list[str], tmp_path: Path, capsys: Capture) -> None:
    plain = sweep[: sweep.index("--strides")]
    two = [*plain[: plain.index("--weights")], "--weights", "a, b"]
    assert "--strides or --sweep" in sentence(two, capsys)
    assert "--strides" in sentence([*plain, "--strides", "8;4"], capsys)
    assert "--sweep" in sentence([*plain, "--sweep", "0"], capsys)
    assert "stride 80" in sentence([*plain, "--strides", "64,80"], capsys)
    assert "--stride and --strides" in sentence([*sweep, "--stride", "8"], capsys)
    with pytest.raises(SystemExit):
        main([*plain, "--refine.gamma", "3"])
    assert "--model.refine CLASS. Allowed: LPOSS" in capsys.readouterr().err
    assert "--out" in sentence([*plain, "--out", __file__], capsys)
    unused = ["evaluate", "--figures", "a", "--weights", "b", "--out", "c"]
    assert "--weights" in sentence(unused, capsys)
    assert "--repeats" in sentence([*plain, "--sweep", "64", "--repeats", "0"], capsys)
    assert "mean anyup" in sentence([*plain, "--upsampler", "anypu"], capsys)
    assert "gamma" in sentence([*plain, "--refine", "LPOSS", "--refine.gamma", "-1"], capsys)
    wrong = [*sweep, "--weights", f"{tmp_path / 'student.safetensors'},{tmp_path / 'typo'}"]
    assert f"{tmp_path / 'typo'}" in sentence([*wrong, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()  # rejected before any measurement
    (tmp_path / "sweep.json").write_text("{}")
    for place, words in ((tmp_path, "sweep.json"), (tmp_path / "none", "sweep.json")):
        text = sentence(["evaluate", "--figures", str(place), "--out", str(tmp_path / "figures")], capsys)
        assert words in text and "--strides or --sweep" in text
    assert "--out" in sentence([*sweep, "--out", str(tmp_path)], capsys)
