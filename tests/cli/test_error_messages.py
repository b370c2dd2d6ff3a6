"""Tests of settings that Lightning or a missing package rejects: one line that names the option, exit code 2."""

import errno
import os
from pathlib import Path

import pytest

from spar_lightning.cli import main
from spar_lightning.cli.error_messages import explained

CALLBACK = "--trainer.callbacks"
# Arguments, and what the message must name.
BAD = {
    "no GPU": (["--trainer.accelerator", "gpu"], "trainer.accelerator"),
    "unknown accelerator": (["--trainer.accelerator", "foo"], "trainer.accelerator"),
    "no devices": (["--trainer.devices", "0"], "trainer.devices"),
    "device that does not exist": (["--trainer.devices", "[5]"], "trainer.devices"),
    "no nodes": (["--trainer.num_nodes", "0"], "trainer.num_nodes"),
    "unknown strategy": (["--trainer.strategy", "foo"], "trainer.strategy"),
    "package of a strategy": (["--trainer.strategy", "deepspeed"], "trainer.strategy"),
    "strategy for GPUs": (["--trainer.strategy", "fsdp"], "trainer.strategy"),
    "unknown precision": (["--trainer.precision", "8"], "trainer.precision"),
    "negative epochs": (["--trainer.max_epochs", "-5"], "trainer.max_epochs"),
    "negative steps": (["--trainer.max_steps", "-5"], "trainer.max_steps"),
    "no duration": (["--trainer.max_time", "foo"], "trainer.max_time"),
    "interval above 1": (["--trainer.val_check_interval", "1.5"], "trainer.val_check_interval"),
    "limit above 1": (["--trainer.limit_train_batches", "1.5"], "trainer.limit_train_batches"),
    "negative limit": (["--trainer.limit_val_batches", "-1"], "trainer.limit_val_batches"),
    "overfit_batches": (["--trainer.overfit_batches", "3.5"], "trainer.overfit_batches"),
    "clipping": (["--trainer.gradient_clip_algorithm", "foo"], "trainer.gradient_clip_algorithm"),
    "unknown profiler": (["--trainer.profiler", "foo"], "trainer.profiler"),
    "dry run": (["--trainer.fast_dev_run", "-1"], "trainer.fast_dev_run"),
    "reload": (["--trainer.reload_dataloaders_every_n_epochs", "-1"], "trainer.reload_dataloaders_every_n_epochs"),
    "stopping on no metric": ([f"{CALLBACK}+=EarlyStopping", f"{CALLBACK}.monitor=val_loss"], "trainer.callbacks"),
    "best of no metric": ([f"{CALLBACK}+=ModelCheckpoint", f"{CALLBACK}.monitor=mIoU/foo"], "trainer.callbacks"),
    "number of checkpoints": ([f"{CALLBACK}+=ModelCheckpoint", f"{CALLBACK}.save_top_k=-3"], "trainer.callbacks"),
    "checkpoints without checkpoints": (
        ["--trainer.enable_checkpointing", "false", f"{CALLBACK}+=ModelCheckpoint"], "trainer.callbacks",
    ),
    "package of a logger": (["--trainer.logger", "CometLogger"], "trainer.logger"),
    "unknown logger": (["--trainer.logger", "FooLogger"], "trainer.logger"),
}  # fmt: skip

SLURM = {"SLURM_JOB_ID": "5", "SLURM_JOB_NAME": "job", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
         "SLURM_NODELIST": "localhost"}  # fmt: skip


def message(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail with exit code 2; return its message, without its first words."""
    capsys.readouterr()
    try:
        code: object = main(args)
    except SystemExit as exit:
        code = exit.code
    err = capsys.readouterr().err
    assert code == 2 and "Traceback" not in err, err
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1 and err.rstrip().endswith(lines[0]), err
    return lines[0].split("error: ", 1)[1]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", BAD)
def test_settings_that_cannot_be_used(
    case: str, rank: int, small: list[str], scenes: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Rank 1 finds the error before it has contact to rank 0, which the launcher then ends."""
    if rank:
        for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                            "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
                            "TORCHELASTIC_RUN_ID": "test"}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
    bad, key = BAD[case]
    said = message(["fit", *small, "--data.root", str(scenes), "--run_dir", str(tmp_path / "run"), *bad], capsys)
    assert said.startswith(key), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tasks", "bad"),
    [({"SLURM_NTASKS": "4"}, []), ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, ["--trainer.devices", "3"])],
)
def test_a_slurm_job_with_another_number_of_tasks(
    tasks: dict[str, str], bad: list[str], small: list[str], scenes: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in {**SLURM, **tasks}.items():
        monkeypatch.setenv(name, value)
    args = ["fit", *small, "--data.root", str(scenes), "--run_dir", str(tmp_path / "run"), *bad]
    assert message(args, capsys).startswith("trainer.devices")


def test_what_only_the_data_can_tell(
    small: list[str], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", *small, "--data.root", str(scenes), "--run_dir", str(tmp_path / "run"), "--mean_iou.before", "false",
            "--mean_iou.teacher", "false"]  # fmt: skip
    said = message([*args, "--trainer.val_check_interval", "1000"], capsys)
    assert said.startswith("trainer.val_check_interval is 1000, but an epoch has 12 steps")
    assert main([*args, "--trainer.max_epochs", "2", "--overwrite"]) == 0
    said = message([*args, "--trainer.max_epochs", "1", "--resume", "auto"], capsys)
    assert said.startswith("trainer.max_epochs is 1, but last.ckpt was saved after 2")
    said = message([*args, "--trainer.max_steps", "5", "--resume", "auto"], capsys)
    assert said.startswith("trainer.max_steps is 5, but last.ckpt was saved after 24")


@pytest.mark.parametrize(
    ("number", "done"),
    [
        *((number, "write") for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EEXIST)),
        *((number, "use") for number in (errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ENOTDIR)),
    ],
)
def test_places_that_cannot_be_used(number: int, done: str, tmp_path: Path) -> None:
    path = str(tmp_path / "new")
    said = explained(OSError(number, os.strerror(number), path))
    assert said is not None and said.startswith(f"cannot {done} {path}: {os.strerror(number)}")


def test_a_system_error_below_another_error() -> None:
    error = ValueError("you tried to log 1.0")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "run/events")
    assert "run/events" in (explained(error) or "")


@pytest.mark.parametrize("readable", [False, True])
def test_reading_and_writing(readable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: readable)
    (tmp_path / "file").touch()
    said = explained(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "file")))
    assert said is not None and said.startswith("cannot write" if readable else "cannot read")


def test_missing_folders_and_files(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "file"
    assert str(missing) in (explained(FileNotFoundError(errno.ENOENT, "No such file", str(missing))) or "")
    assert explained(FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "file"))) is None  # a bug
    assert "PYTHONUTF8" in (explained(UnicodeEncodeError("ascii", "a\xfc", 1, 2, "not in range")) or "")
    assert "null character" in (explained(ValueError("lstat: embedded null character in path")) or "")


def test_a_bug_is_not_explained() -> None:
    assert explained(RuntimeError("a bug")) is None and explained(KeyError("a bug")) is None


def test_the_best_checkpoints_of_a_user_beside_ours(small: list[str], scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = ["fit", *small, "--data.root", str(scenes), "--run_dir", str(run), "--mean_iou.before", "false",
            "--mean_iou.teacher", "false", f"{CALLBACK}+=ModelCheckpoint", f"{CALLBACK}.monitor=mIoU/mean",
            f"{CALLBACK}.mode=max", f"{CALLBACK}.save_top_k=3", "--tensorboard", "false"]  # fmt: skip
    assert main(args) == 0
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "epoch.ckpt", "last.ckpt", "epoch=0-step=12.ckpt", "epoch=1-step=24.ckpt"}
