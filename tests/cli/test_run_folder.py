"""Tests of the run folder: one run at a time, and checkpoints that Lightning left in SLURM jobs."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import yaml

from spar_lightning.cli import main
from spar_lightning.cli.fit_run_files import SETTINGS
from spar_lightning.cli.fit_run_folder import RunFolder, RunFolderError
from spar_lightning.files import leases
from tests.cli.test_nodes import task, until

OTHER = "another-machine.17.0123456789abcdef"


def test_a_second_run_in_the_same_folder(
    small: list[str], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    args = ["fit", *small, "--data.root", str(scenes), "--run_dir", str(run), "--mean_iou.before", "false",
            "--mean_iou.teacher", "false"]  # fmt: skip
    slow = ["--trainer.callbacks+=tests.faults.Slow", "--trainer.callbacks.step=0.3"]
    pid = task([*args, *slow], {}, tmp_path / "first")
    until(lambda: (run / "metrics.jsonl").exists())
    for resume in (["--resume", "auto"], ["--overwrite"]):
        assert main([*args, *resume]) == 2
        assert f"{run} is in use by another spar fit" in capsys.readouterr().err
    assert "To continue" not in (tmp_path / "first").read_text()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert main([*args, "--trainer.max_epochs", "1", "--resume", "auto"]) == 0  # the lease of a dead process
    assert not (run / ".lease").exists()
    assert main(args) == 2


def test_a_run_that_ended_while_this_one_started(tmp_path: Path) -> None:
    """Two starts at the same moment: the second gets the lease when the first has finished."""
    second = RunFolder(str(tmp_path / "run"), "never", overwrite=False)
    with RunFolder(str(tmp_path / "run"), "never", overwrite=False).lease():
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({name: {} for name in SETTINGS}))
        (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(RunFolderError, match="already contains a run"), second.lease():
        pass


@pytest.mark.parametrize("alive", [False, True])
def test_a_lease_of_another_machine(alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start waits for a sign of life: with one it ends, without one it takes over."""
    monkeypatch.setattr(leases, "STALE", 3.0)
    lease = tmp_path / "run" / ".lease" / "claims" / "run" / OTHER
    lease.parent.mkdir(parents=True)
    (lease.parents[2] / "tmp").mkdir()
    lease.touch()
    if alive:
        threading.Timer(1.5, os.utime, [lease]).start()
        with pytest.raises(RunFolderError, match=r"in use by another spar fit \(another-machine\.17"):
            RunFolder(str(tmp_path / "run"), "never", overwrite=False).lease().__enter__()
    else:
        with RunFolder(str(tmp_path / "run"), "never", overwrite=False).lease():
            assert not lease.exists()


def test_checkpoints_of_lightnings_signal_handler(
    small: list[str], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in {"SLURM_JOB_ID": "5", "SLURM_JOB_NAME": "job", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
                        "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
                        "SLURM_NODELIST": "localhost"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    args = ["fit", *small, "--data.root", str(scenes), "--run_dir", str(run), "--mean_iou.before", "false",
            "--mean_iou.teacher", "false", "--trainer.max_steps"]  # fmt: skip
    assert main([*args, "5"]) == 0
    foreign = run / "hpc_ckpt_1.ckpt"
    (run / "checkpoints" / "last.ckpt").rename(foreign)
    assert main([*args, "7", "--resume", "auto"]) == 2  # Lightning would silently continue from it
    assert f"Pass --resume {foreign} to continue from it" in capsys.readouterr().err
    assert main([*args, "7", "--resume", str(foreign)]) == 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 7
    assert main([*args, "8", "--resume", "auto"]) == 0
    assert "hpc_ckpt_1.ckpt" in caplog.text and "is not used" in caplog.text
    assert main([*args, "3", "--overwrite"]) == 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3 and not foreign.exists()
