"""Tests of `spar fit` on a small quickstart configuration: files of the run, and resume."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from spar_lightning.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small: list[str], scenes: Path) -> Path:
    """Return the folder of a finished small run."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    pictures = ["--pictures.images", "1"]
    assert main(["fit", *small, *pictures, "--data.root", str(scenes), "--run_dir", str(folder)]) == 0
    return folder


def test_the_run_folder(run: Path) -> None:
    made = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    events = {name for name in made if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert made - events == {
        "config.yaml", "metrics.jsonl", "results.json", "train.log",
        "checkpoints/best.ckpt", "checkpoints/epoch.ckpt", "checkpoints/last.ckpt", "plots/curves.png",
        "plots/predictions.png",
    }  # fmt: skip


def test_metrics_hold_loss_and_miou(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(24))
    validated = [row for row in rows if "mIoU/mean" in row]
    assert len(validated) == 2
    for row in validated:
        assert row["mIoU/mean"] == pytest.approx((row["mIoU/scenes_64"] + row["mIoU/scenes_96"]) / 2, rel=1e-6)
    assert {"before/mIoU/scenes_96", "teacher/mIoU/scenes_96"} <= {name for row in rows for name in row}


def test_results_count_every_image_once(run: Path) -> None:
    rows = json.loads((run / "results.json").read_text())
    assert [row["stage"] for row in rows] == ["before", "teacher", "after"]
    assert all(row["images"] == {"scenes_64": 5, "scenes_96": 5} for row in rows)
    assert rows[0]["miou"]["scenes_64"] == pytest.approx(rows[1]["miou"]["scenes_64"])  # one window covers all


def test_the_checkpoint_is_plain_data(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert "hyper_parameters" not in checkpoint and "datamodule_hyper_parameters" not in checkpoint
    assert all(name.startswith("student.") for name in checkpoint["state_dict"])
    assert checkpoint["spar"]["trainable"] == ["blocks.-3", "blocks.-2", "blocks.-1"]


def test_the_saved_config_repeats_the_run(run: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["backbone"]["class_path"] == "spar_lightning.backbones.Tiny"
    assert "lr_schedule" in config["model"]  # null is saved, because another configuration may set a value
    assert "resume" not in config and "overwrite" not in config
    assert main(["fit", "--config", str(run / "config.yaml"), "--run_dir", str(tmp_path / "again")]) == 0
    assert final_weights(tmp_path / "again", run)


def final_weights(one: Path, other: Path) -> bool:
    """Return True if two runs ended with bitwise equal weights."""
    states = [torch.load(p / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for p in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_validate_repeats_the_final_score(run: Path, small: list[str], scenes: Path, capsys: Capture) -> None:
    last = str(run / "checkpoints" / "last.ckpt")
    assert main(["validate", *small, "--data.root", str(scenes), "--weights", last]) == 0
    after = json.loads((run / "results.json").read_text())[2]["miou"]
    out = capsys.readouterr().out
    assert f"{after['scenes_96']:.1f}" in out and "single pass" in out


def test_a_resume_keeps_overrides_and_the_old_config(small: list[str], scenes: Path, tmp_path: Path) -> None:
    where = ["--data.root", str(scenes), "--run_dir", str(tmp_path / "run")]
    assert main(["fit", *small, *where, "--trainer.max_epochs", "1"]) == 0
    first = (tmp_path / "run" / "config.yaml").read_text()
    for resume in ("auto", str(tmp_path / "run" / "checkpoints" / "last.ckpt")):
        assert main(["fit", *small, *where, "--model.lr", "0.5", "--resume", resume]) == 0
    assert (tmp_path / "run" / "config.yaml").read_text() == first
    for name in ("config-resume-1.yaml", "config-resume-2.yaml"):
        assert yaml.safe_load((tmp_path / "run" / name).read_text())["model"]["lr"] == 0.5
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0.5
    assert checkpoint["global_step"] == 24


def test_stopped_at_an_epoch_and_resumed_is_the_same_as_not_stopped(
    run: Path, small: list[str], scenes: Path, tmp_path: Path
) -> None:
    where = ["--data.root", str(scenes), "--run_dir", str(tmp_path / "run")]
    assert main(["fit", *small, *where, "--trainer.max_epochs", "1"]) == 0
    assert main(["fit", *small, *where, "--resume", "auto"]) == 0
    assert final_weights(tmp_path / "run", run)
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["stage"] for row in rows] == ["before", "teacher", "after"]  # `before` was measured in the first start
    assert rows[0]["miou"] == json.loads((run / "results.json").read_text())[0]["miou"]


def test_resume_auto_without_a_run_starts_one(small: list[str], scenes: Path, tmp_path: Path) -> None:
    args = ["--data.root", str(scenes), "--run_dir", str(tmp_path / "run"), "--trainer.max_steps", "2"]
    assert main(["fit", *small, *args, "--resume", "auto"]) == 0
    (tmp_path / "run" / "notes.txt").touch()  # files that the run did not write are not deleted
    assert main(["fit", *small, *args, "--overwrite"]) == 0
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert "config-resume-1.yaml" not in made and "notes.txt" in made


def test_without_a_cache_the_teacher_runs_in_the_step(
    run: Path, small: list[str], scenes: Path, tmp_path: Path
) -> None:
    where = ["--data.root", str(scenes), "--run_dir", str(tmp_path / "run"), "--data.cached", "false"]
    assert main(["fit", *small, *where]) == 0
    losses = [
        [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path / "run")
    ]
    cached, online = ([loss for loss in curve if loss is not None] for curve in losses)
    assert online == pytest.approx(cached, rel=2e-2)  # the cache stores float16


def test_mixed_precision_and_layered_configs(small: list[str], scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("trainer:\n  precision: bf16-mixed\n  max_steps: 2\nmodel:\n  lr: 0.25\n")
    where = ["--data.root", str(scenes), "--run_dir", str(tmp_path / "run"), "--data.cached", "false"]
    assert main(["fit", *small, "--config", str(tmp_path / "more.yaml"), *where]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["lr"] == 0.25 and config["data"]["init_args"]["train_scenes"] == 12
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < loss < 10 for loss in losses if loss is not None)


def test_the_teacher_of_another_stride_does_not_fit_the_cache(
    run: Path, small: list[str], scenes: Path, tmp_path: Path, capsys: Capture
) -> None:
    where = ["--data.root", str(scenes), "--run_dir", str(tmp_path / "run"), "--model.stride", "8"]
    assert main(["fit", *small, *where]) == 2
    printed = capsys.readouterr().err
    assert "teacher.stride" in printed and "data.root" in printed


def test_a_piped_shard_trains_and_caches_like_a_file(photos: str, tmp_path: Path) -> None:
    """Train without a cache in loader processes, and with a cache; its shard is bitwise equal to that of a file."""
    common = [
        "fit", "--model.backbone", "Tiny", "--model.stride", "32", "--data", "SA1B",
        "--data.augmentation.preset", "small", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    pipe = f"pipe:gzip -c {photos}"
    streamed = ["--data.shards", pipe, "--data.num_workers", "2", "--run_dir", str(tmp_path / "streamed")]
    assert main([*common, *streamed]) == 0
    state = torch.load(tmp_path / "streamed" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    for name, shards in (("pipe", pipe), ("file", photos)):
        where = ["--data.cache", str(tmp_path / name), "--run_dir", str(tmp_path / f"run-{name}")]
        assert main([*common, "--data.shards", shards, *where]) == 0
    made = [(tmp_path / name / "shards" / "00000.h5").read_bytes() for name in ("pipe", "file")]
    assert made[0] == made[1]
