"""Tests of the mIoU measured in a run: benchmarks, images and times."""

import json
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from torch import Tensor

from spar_lightning.backbones import Backbone, Tiny
from spar_lightning.callbacks import mean_iou
from spar_lightning.callbacks.mean_iou import MeanIoU
from spar_lightning.cli import main
from spar_lightning.datamodules import RenderedScenes
from spar_lightning.distillation import Distillation
from spar_lightning.evaluation.benchmark import Benchmark
from spar_lightning.segmentation.label_map import SimilarityMaps
from spar_lightning.segmentation.segmenter import Segmenter
from tests.refinement.test_anyup import official_file

Capture = pytest.CaptureFixture[str]


def test_a_part_of_the_benchmarks_every_few_steps(small: list[str], scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = [
        "--mean_iou.benchmarks", "[scenes_96]", "--mean_iou.max_images", "3", "--mean_iou.teacher", "false",
        "--trainer.val_check_interval", "5", "--trainer.check_val_every_n_epoch", "null",
    ]  # fmt: skip
    assert main(["fit", *small, *args, "--data.root", str(scenes), "--run_dir", str(run)]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [row for row in rows if "mIoU/mean" in row]
    assert [row["step"] for row in validated] == [4, 9, 14, 19]
    assert all(row["mIoU/mean"] == row["mIoU/scenes_96"] and "mIoU/scenes_64" not in row for row in validated)
    assert (run / "checkpoints" / "best.ckpt").exists()
    results = json.loads((run / "results.json").read_text())
    assert [(row["stage"], row["images"]) for row in results] == [
        ("before", {"scenes_96": 3}),
        ("after", {"scenes_96": 3}),
    ]


@pytest.mark.slow
def test_refinement_in_a_run(small: list[str], scenes: Path, tmp_path: Path) -> None:
    """Compare the callback's results with LPOSS and AnyUp to those of `spar evaluate`."""
    file, run = str(official_file(tmp_path / "anyup.pth")), tmp_path / "run"
    place = ["--data.root", str(scenes)]
    refined = ["--model.refine", "LPOSS", "--model.refine.gamma", "5", "--model.upsampler", file]
    more = ["--mean_iou.max_images", "2", "--trainer.max_epochs", "1", "--run_dir", str(run)]
    assert main(["fit", *small, *place, *refined, *more]) == 0
    rows = {row["stage"]: row["miou"] for row in json.loads((run / "results.json").read_text())}
    config = ["--config", str(run / "config.yaml"), "--max_images", "2"]
    again = ["--refine", "LPOSS", "--refine.preset", "pretrained", "--refine.gamma", "5", "--upsampler", file]
    for stage, way in (
        ("before", again),
        ("teacher", ["--inference", "sliding"]),
        ("after", ["--weights", str(run / "checkpoints" / "last.ckpt")]),
    ):
        out = tmp_path / stage
        assert main(["evaluate", *config, *way, "--out", str(out)]) == 0
        results = json.loads((out / "results.json").read_text())
        assert {name: row["mIoU"] for name, row in results["benchmarks"].items()} == pytest.approx(rows[stage])
        assert results["protocol"]["refine"]["gamma"] == 5 and results["protocol"]["upsampler"]["name"] == "AnyUp"


def test_a_resume_with_another_refinement(
    small: list[str], scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that were measured with other settings are removed from the table."""
    run = tmp_path / "run"
    more = ["--data.root", str(scenes), "--mean_iou.max_images", "1", "--run_dir", str(run)]
    assert main(["fit", *small, *more, "--trainer.max_epochs", "1", "--model.refine", "LPOSS"]) == 0
    assert [row["stage"] for row in json.loads((run / "results.json").read_text())] == ["before", "teacher", "after"]
    assert main(["fit", *small, *more, "--resume", "auto"]) == 0
    assert [row["stage"] for row in json.loads((run / "results.json").read_text())] == ["after"]
    assert 'measured with other settings (refine: {"name": "LPOSS", "gamma": 1.0' in caplog.text


@pytest.mark.parametrize(("attention", "rows"), [
    ("full", ["before", "windowed", "tiling", "teacher", "after"]),
    ("windowed", ["full", "before", "tiling", "teacher", "after"]),
])  # fmt: skip
def test_baselines(small: list[str], scenes: Path, tmp_path: Path, attention: str, rows: list[str]) -> None:
    """Each mode is measured once, with the numbers of `spar evaluate`."""
    run = tmp_path / "run"
    more = ["--data.root", str(scenes), "--run_dir", str(run), "--trainer.max_epochs", "1"]
    baselines = ["--mean_iou.baselines", "[full,windowed,tiling]", "--model.attention", attention]
    assert main(["fit", *small, *more, *baselines]) == 0
    results = {row["stage"]: row for row in json.loads((run / "results.json").read_text())}
    assert list(results) == rows and all(row["ms"] > 0 for row in results.values())
    benchmark = str(scenes / "seed-0" / "scenes_96")
    for stage, options in (
        ("tiling", ["--inference", "sliding", "--stride", "64"]),
        (rows[0], ["--attention", "full"]),
    ):
        out = tmp_path / stage
        config = ["--config", str(run / "config.yaml"), "--benchmarks", benchmark, "--out", str(out)]
        assert main(["evaluate", *config, *options]) == 0
        miou = json.loads((out / "results.json").read_text())["benchmarks"]["scenes_96"]["mIoU"]
        assert miou == pytest.approx(results[stage]["miou"]["scenes_96"])


def test_a_baseline_that_the_backbone_does_not_have(caplog: pytest.LogCaptureFixture) -> None:
    backbone = Tiny()
    backbone.windowable = False
    trainer, callback = Trainer(logger=False), MeanIoU(baselines=["windowed", "tiling"])
    trainer.datamodule = RenderedScenes(val_sizes=())  # type: ignore[attr-defined]
    callback.setup(trainer, Distillation(backbone), "validate")
    assert callback.baselines == ["windowed", "tiling"] and not caplog.text  # not measured there
    callback.setup(trainer, Distillation(backbone), "fit")
    assert callback.baselines == ["tiling"] and "mean_iou.baselines: windowed is left out" in caplog.text


def test_nothing_at_the_end(small: list[str], scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = ["--mean_iou.before", "false", "--mean_iou.teacher", "false", "--mean_iou.at_end", "false"]
    more = ["--data.root", str(scenes), "--run_dir", str(run), "--trainer.max_epochs", "1"]
    assert main(["fit", *small, *args, *more]) == 0
    assert not (run / "results.json").exists() and "mIoU/mean" in (run / "metrics.jsonl").read_text()


def test_a_name_that_is_no_benchmark(small: list[str], scenes: Path, tmp_path: Path, capsys: Capture) -> None:
    args = ["--data.root", str(scenes), "--run_dir", str(tmp_path / "run"), "--mean_iou.benchmarks", "[scenes_46]"]
    assert main(["fit", *small, *args]) == 2
    text = capsys.readouterr().err
    assert "mean_iou.benchmarks: 'scenes_46'" in text and "scenes_96 or scenes_64" in text
    assert not (tmp_path / "run" / "train.log").exists()


def test_the_last_validation_counts_and_all_rows_are_timed_in_alternation(
    small: list[str], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, timed = [], []
    measure, time, segmenter = MeanIoU._measure, MeanIoU._time, mean_iou._segmenter

    def noted(self: MeanIoU, trainer: Trainer, stage: mean_iou.Stage) -> None:
        measured.append(stage)
        measure(self, trainer, stage)

    def with_names(self: MeanIoU, trainer: Trainer) -> None:
        def named(trainer: Trainer, stage: mean_iou.Stage, benchmark: Benchmark, network: Backbone) -> Segmenter:
            made = segmenter(trainer, stage, benchmark, network)
            similarities = made.similarities

            def spy(image: Tensor, embeddings: Tensor) -> SimilarityMaps:
                timed.append(stage)
                return similarities(image, embeddings)

            monkeypatch.setattr(made, "similarities", spy)
            return made

        with monkeypatch.context() as patch:
            patch.setattr(mean_iou, "_segmenter", named)
            time(self, trainer)

    monkeypatch.setattr(MeanIoU, "_measure", noted)
    monkeypatch.setattr(MeanIoU, "_time", with_names)
    run = tmp_path / "run"
    assert main(["fit", *small, "--data.root", str(scenes), "--run_dir", str(run), "--trainer.max_epochs", "1"]) == 0
    assert measured == ["before", "teacher"]  # the Trainer validated the student in the last step
    assert timed == ["before", "teacher", "after"] * 5
    rows = json.loads((run / "results.json").read_text())
    assert [row["stage"] for row in rows] == ["before", "teacher", "after"] and all(row["ms"] > 0 for row in rows)
    log = (run / "train.log").read_text()
    assert "parameters are trained" in log and "| sliding window (teacher)" in log  # summary and table
