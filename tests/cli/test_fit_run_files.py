"""Tests that a run folder is recognized by its content, and that only files of a run are deleted."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spar_lightning.cli import main
from spar_lightning.cli.fit_run_files import SETTINGS, delete_run, is_settings
from spar_lightning.cli.fit_run_folder import RunFolder, RunFolderError

RUN: dict[str, Any] = {name: {} for name in SETTINGS}
OLDER = Path(__file__).parents[1] / "data" / "version_0.1" / "run"
OTHER_TOOL = (
    *("train.log", "config.yaml", "results.json", "metrics.jsonl", "events.out.tfevents.1.theirs", "plots/curves.png"),
    *("plots/predictions.png", "checkpoints/last.ckpt", "config-resume-1.yaml", "hpc_ckpt_1.ckpt"),
)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"precious {name}")


def save(path: Path, **entries: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(entries, path)


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--resume", "auto"]])
def test_a_folder_of_another_tool(
    options: list[str], small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other"
    write(folder, *OTHER_TOOL)
    before = content(folder)
    assert main(["fit", *small, "--run_dir", str(folder), *options]) == 2
    assert f"{folder} is not empty" in capsys.readouterr().err
    assert content(folder) == before


@pytest.mark.parametrize("name", OTHER_TOOL)
def test_one_file_of_another_tool(name: str, tmp_path: Path) -> None:
    write(tmp_path, name)
    for overwrite in (False, True):
        with pytest.raises(RunFolderError, match="not empty"):
            RunFolder(str(tmp_path), "never", overwrite)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (yaml.safe_dump(RUN), True),
        (yaml.safe_dump({**RUN, "tensorboard": True}), True),
        (yaml.safe_dump({**RUN, "resume": "never", "overwrite": False}), False),  # of --print_config
        (yaml.safe_dump({"model": {}, "data": {}, "trainer": {}, "seed_everything": 0}), False),  # of LightningCLI
        *((text, False) for text in ("", "[1, 2", "- a", "day: 2024-99-99", "!!python/name:os.system", "\x00")),
    ],
)
def test_settings_of_a_run(text: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert is_settings(tmp_path / "config.yaml") is expected


def test_settings_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    assert not is_settings(tmp_path / "config.yaml") and not is_settings(tmp_path) and not is_settings(tmp_path / "no")


def test_a_run_of_version_0_1(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLDER, run)
    with pytest.raises(RunFolderError, match="already contains a run"):
        RunFolder(str(run), "never", overwrite=False)
    assert RunFolder(str(run), "auto", overwrite=False).checkpoint() == str(run / "checkpoints" / "last.ckpt")
    delete_run(run)
    assert set(content(run)) == {"config.yaml"}


def test_only_files_of_the_run_are_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "config-resume-1.yaml").write_text(yaml.safe_dump(RUN))
    write(tmp_path, "metrics.jsonl", "train.log", "results.json", "events.out.tfevents.1.x", "plots/curves.png",
          "checkpoints/last.ckpt", "checkpoints/best.ckpt.unfinished")  # fmt: skip
    save(tmp_path / "checkpoints" / "epoch=3.ckpt", spar={}, state_dict={})  # of a callback of the user
    save(tmp_path / "hpc_ckpt_1.ckpt", spar={})
    kept = {"config-resume-mine.yaml", "checkpoints/notes.md", "checkpoints/text.ckpt", "plots/mine.png", "mlflow.db"}
    write(tmp_path, *kept)
    save(tmp_path / "checkpoints" / "mymodel.ckpt", state_dict={})
    (tmp_path / "plots" / "predictions.png").mkdir()  # a folder with the name of a file
    (tmp_path / "scans").mkdir()
    kept.add("checkpoints/mymodel.ckpt")
    before = content(tmp_path)
    delete_run(tmp_path)
    after = content(tmp_path)
    assert set(after) == kept | {"config.yaml"} and all(before[name] == after[name] for name in after)
    warning = next(record.getMessage() for record in caplog.records if "Kept" in record.getMessage())
    assert "checkpoints/mymodel.ckpt, checkpoints/notes.md" in warning and "2 more" in warning
    assert "scans" not in warning and "hpc_ckpt_1.ckpt is deleted" in caplog.text


def test_a_link_to_a_file_elsewhere(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/model.ckpt")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").symlink_to(tmp_path / "elsewhere" / "model.ckpt")
    delete_run(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir()) and (tmp_path / "elsewhere" / "model.ckpt").exists()


def start(folder: Path | str, resume: str = "never", overwrite: bool = False) -> None:
    run = RunFolder(str(folder), resume, overwrite)
    with run.lease():
        run.create(RUN)


@pytest.mark.parametrize("extra", ["mlflow.db", ".lease/claims"])
def test_a_start_that_failed_is_replaced_without_asking(extra: str, tmp_path: Path) -> None:
    (tmp_path / "run" / extra).mkdir(parents=True)
    for resume in ("never", "auto", "never"):
        start(tmp_path / "run", resume)
    names = {path.name for path in (tmp_path / "run").iterdir()} - {"mlflow.db"}
    assert names == {"config.yaml", "checkpoints", "plots", "train.log"}


@pytest.mark.parametrize("result", ["metrics.jsonl", "results.json", "plots/mine.png", "checkpoints/mine.ckpt"])
def test_a_start_with_results_is_not_replaced(result: str, tmp_path: Path) -> None:
    start(tmp_path)
    write(tmp_path, result)
    with pytest.raises(RunFolderError, match="already contains a run"):
        start(tmp_path)
    start(tmp_path, "auto")
    assert is_settings(tmp_path / "config-resume-1.yaml") and (tmp_path / result).read_text() == f"precious {result}"
    start(tmp_path, overwrite=True)
    assert not (tmp_path / "config-resume-1.yaml").exists() and is_settings(tmp_path / "config.yaml")


def a_file(path: Path) -> None:
    path.write_text("precious")


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "missing")


def a_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("below", "make"),
    [("run", a_file), ("run", a_dangling_link), ("run", a_loop), ("run/x", a_file), ("run/x", a_loop)],
)
def test_a_path_that_cannot_be_a_folder(below: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "run")
    with pytest.raises(RunFolderError, match="run_dir"):
        start(tmp_path / below)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("root", ["", "x" * 300, "/proc/run", "/dev/null/run"])
def test_a_path_that_cannot_be_used(root: str) -> None:
    with pytest.raises(RunFolderError, match="run_dir"):
        start(root)


@pytest.mark.parametrize("name", ["a\nb", "ü €", "a: b #c", "\udcff"])
def test_odd_names_of_a_folder(name: str, tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / name), "never", overwrite=False)
    with run.lease():
        run.create({**RUN, "run_dir": name})
    assert yaml.safe_load((tmp_path / name / "config.yaml").read_text())["run_dir"] == name
