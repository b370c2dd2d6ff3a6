"""Tests of the loggers of a run: W&B and MLflow without a network, TensorBoard, and which of them a run has."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import wandb
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from spar_lightning.callbacks.event_file import Events
from spar_lightning.callbacks.run_loggers import create_logger, log_picture, log_settings, log_table
from spar_lightning.cli import main
from spar_lightning.cli.fit import _loggers

Capture = pytest.CaptureFixture[str]

BOTH = {
    "trainer": {
        "logger": [
            {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"offline": True, "project": "spar"}},
            {"class_path": "lightning.pytorch.loggers.MLFlowLogger"},
        ]
    }
}


@dataclass
class Logged:
    """Finished run with both loggers: its folder, the folder that was the current one, and the values W&B has."""

    folder: Path
    current: Path
    summary: dict[str, Any]
    config: dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Work in a temporary folder; neither package writes to the home folder or sends usage statistics."""
    folder = tmp_path_factory.mktemp("loggers")
    (folder / "current").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "current")
        for name in ("CONFIG", "CACHE", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(folder / "home"))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder
        wandb.teardown()


@pytest.fixture(scope="module")
def logged(place: Path, small: list[str], scenes: Path) -> Logged:
    """Return a run that was logged with W&B, MLflow and TensorBoard."""
    (place / "both.yaml").write_text(yaml.safe_dump(BOTH))
    args = ["--config", str(place / "both.yaml"), "--data.root", str(scenes), "--run_dir", str(place / "run")]
    assert main(["fit", *small, *args, "--pictures.images", "1", "--trainer.max_epochs", "1"]) == 0
    assert wandb.run is not None
    summary, config = dict(wandb.run.summary), dict(wandb.run.config)
    wandb.finish()
    return Logged(place / "run", place / "current", summary, config)


def results(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of results.json."""
    rows: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return rows


def test_wandb_gets_scalars_pictures_table_and_settings(logged: Logged) -> None:
    rows = results(logged.folder)
    assert logged.summary["loss"] > 0
    assert logged.summary["mIoU/scenes_96"] == pytest.approx(rows[2]["miou"]["scenes_96"])
    assert logged.config["model"]["lr"] == 1e-3
    (files,) = (logged.folder / "wandb").glob("offline-run-*/files")
    assert {path.name.split("_")[0] for path in (files / "media" / "images" / "plots").iterdir()} == {
        "curves",
        "predictions",
    }
    (table,) = (files / "media" / "table").glob("results_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["stage", "mIoU/scenes_64", "mIoU/scenes_96", "ms"]
    assert [row[0] for row in content["data"]] == ["before", "teacher", "after"]
    assert content["data"][2][2] == pytest.approx(rows[2]["miou"]["scenes_96"])
    assert content["data"][1][3] == pytest.approx(rows[1]["ms"])


def test_mlflow_gets_scalars_pictures_table_and_settings(logged: Logged) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{logged.folder / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == list(range(12))
    assert run.data.metrics["mIoU/scenes_96"] == pytest.approx(results(logged.folder)[2]["miou"]["scenes_96"])
    assert run.data.params["model/lr"] == "0.001" and run.info.status == "FINISHED"
    (artifacts,) = (logged.folder / "mlartifacts").glob("*/artifacts")
    assert {str(path.relative_to(artifacts)) for path in artifacts.rglob("*.*")} == {
        "plots/curves.png",
        "plots/predictions.png",
        "results.md",
    }
    assert "teacher" in (artifacts / "results.md").read_text()


def test_tensorboard_is_written_as_well(logged: Logged) -> None:
    events = EventAccumulator(str(logged.folder))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "mIoU/mean"} <= set(tags["scalars"]) and "hp_metric" not in tags["scalars"]
    assert set(tags["images"]) == {"plots/curves", "plots/predictions"}
    assert tags["tensors"] == ["results/text_summary"]


def test_nothing_is_written_to_the_current_folder(logged: Logged) -> None:
    assert not list(logged.current.iterdir())


def test_the_saved_settings_name_no_folder_of_this_run(logged: Logged) -> None:
    config = yaml.safe_load((logged.folder / "config.yaml").read_text())
    first, second = (logger["init_args"] for logger in config["trainer"]["logger"])
    assert first["save_dir"] == "." and second["tracking_uri"] is None  # a new run uses its own folder


def test_loggers_of_a_run(tmp_path: Path) -> None:
    def kinds(chosen: Any, tensorboard: bool = True) -> list[type[Logger]]:
        return [type(logger) for logger in _loggers(chosen, tensorboard, str(tmp_path))]

    csv, own = CSVLogger(tmp_path), TensorBoardLogger(tmp_path)
    assert kinds(None) == kinds(True) == [Events]
    assert kinds(None, tensorboard=False) == kinds(False) == []
    assert kinds(csv) == kinds([csv]) == [CSVLogger, Events]
    assert kinds([csv], tensorboard=False) == [CSVLogger]
    assert kinds([own, csv]) == [TensorBoardLogger, CSVLogger]
    assert kinds(own, tensorboard=False) == [TensorBoardLogger]


def test_a_run_without_loggers_has_metrics(small: list[str], scenes: Path, tmp_path: Path) -> None:
    bare = ["--trainer.max_steps", "1", "--mean_iou.before", "false", "--mean_iou.teacher", "false"]
    for name, option in (("none", ["--trainer.logger", "false"]), ("no_events", ["--tensorboard", "false"])):
        run = tmp_path / name
        assert main(["fit", *small, *bare, *option, "--data.root", str(scenes), "--run_dir", str(run)]) == 0
        assert (run / "metrics.jsonl").exists() and not list(run.glob("events.*"))


@pytest.mark.parametrize(
    ("package", "logger", "extra"), [("wandb", "WandbLogger", "wandb"), ("sqlalchemy", "MLFlowLogger", "mlflow")]
)
def test_a_missing_package(
    package: str, logger: str, extra: str, small: list[str], tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["fit", *small, "--run_dir", str(tmp_path / "run"), "--trainer.logger", logger]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert package in line and f'pip install "spar-lightning[{extra}]"' in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_packages_are_imported_only_if_they_are_used() -> None:
    code = "import sys, spar_lightning.cli.fit; sys.exit({'wandb', 'mlflow'} & set(sys.modules) != set())"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_places_that_the_user_gives(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3.17 asks for it; servers need no such folder
    run, other = tmp_path / "run", tmp_path / "other"
    wandb_logger = create_logger(run, WandbLogger, save_dir=str(other), dir=None)
    files = create_logger(run, MLFlowLogger, save_dir=str(other / "files"), tracking_uri=None)
    server = create_logger(run, MLFlowLogger, save_dir="./mlruns", tracking_uri=f"file:{other / 'uri'}")
    assert [logger.save_dir for logger in (wandb_logger, files, server)] == [
        str(other),
        str(other / "files"),
        str(other / "uri"),
    ]
    assert create_logger(run, WandbLogger, save_dir=".", entity="me").save_dir == str(run)
    assert not run.exists()


def test_mlflow_in_a_folder_of_files(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    Image.new("RGB", (8, 8)).save(tmp_path / "curves.png")
    log_picture([logger], tmp_path / "curves.png", 3)
    log_table([logger], "results", ["stage", "ms"], [["before", 1.25], ["after", None]], 3)
    log_settings([logger], {"model": {"lr": 1.0}})
    assert logger.run_id is not None
    again = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}", run_id=logger.run_id)
    log_settings([again], {"model": {"lr": 2.0}})  # MLflow would reject the other value
    assert again.experiment.get_run(logger.run_id).data.params == {"model/lr": "1.0"}
    (artifacts,) = (tmp_path / "mlruns").glob("*/*/artifacts")
    assert (artifacts / "plots" / "curves.png").exists()
    assert "| after  | -   |" in (artifacts / "results.md").read_text()


def test_other_loggers_get_no_media(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    log_picture([logger], tmp_path / "missing.png", 0)
    log_table([logger], "results", ["a"], [["b"]], 0)
    assert not list(tmp_path.iterdir())


def test_other_ranks_create_no_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert isinstance(create_logger(tmp_path, MLFlowLogger, save_dir="./mlruns", tracking_uri=None), DummyLogger)
    assert not list(tmp_path.iterdir())
