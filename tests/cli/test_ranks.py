"""Tests of errors on one of two ranks: both processes end within seconds, with one message and one exit code."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_nodes import free_port, task, until
from tests.cli.test_signals import code_of

SOON = 15.0  # seconds


@pytest.fixture
def args(small: list[str], scenes: Path) -> list[str]:
    """Return the arguments of a run on two processes."""
    return ["fit", *small, "--data.root", str(scenes), "--mean_iou.before", "false", "--mean_iou.teacher", "false",
            "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]  # fmt: skip


def ranks(args: list[str], folders: list[Path]) -> tuple[list[int], list[Path]]:
    """Start two ranks with the variables of torchrun, each in a folder; return process IDs and output files."""
    port, outs = free_port(), [folder / f"rank-{rank}" for rank, folder in enumerate(folders)]
    shared = {"GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip
    pids = []
    here = Path.cwd()
    for rank, (folder, out) in enumerate(zip(folders, outs, strict=True)):
        os.chdir(folder)
        pids.append(task(args, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, out))
    os.chdir(here)
    return pids, outs


def fault(**settings: Any) -> list[str]:
    """Return the arguments that add a fault."""
    return ["--trainer.callbacks+=tests.faults.Fault", *(f"--trainer.callbacks.{k}={v}" for k, v in settings.items())]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_ends_both_with_one_message(rank: int, args: list[str], tmp_path: Path) -> None:
    pids, outs = ranks([*args, "--run_dir", str(tmp_path / "run"), *fault(rank=rank, kind="user")], [tmp_path] * 2)
    assert [code_of(pid, 60) for pid in pids] == [2, 2]
    said = "".join(out.read_text() for out in outs)
    assert said.count("full of eels") == 1 and "spar fit: error: data.shards" in said and "Traceback" not in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stops_while_the_other_one_defers_it(rank: int, args: list[str], tmp_path: Path) -> None:
    """At the borders of a validation, which ends at once, only one of two ranks may still defer a signal."""
    pids, outs = ranks([*args, "--run_dir", str(tmp_path / "run"), *fault(rank=rank, kind="stop")], [tmp_path] * 2)
    assert [code_of(pid, 60) for pid in pids] == [143, 143], [out.read_text() for out in outs]
    said = "".join(out.read_text() for out in outs)
    assert "error" not in said and "Traceback" not in said


def test_a_bug_on_one_rank_shows_its_traceback_only(args: list[str], tmp_path: Path) -> None:
    pids, outs = ranks([*args, "--run_dir", str(tmp_path / "run"), *fault(rank=1, kind="bug")], [tmp_path] * 2)
    assert [code_of(pid, 60) for pid in pids] == [1, 1]
    said = [out.read_text() for out in outs]
    assert "Traceback" not in said[0] and said[1].count("ZeroDivisionError: a bug") == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_the_loss_of_a_rank(kind: str, args: list[str], tmp_path: Path) -> None:
    """A rank is killed, or it is suspended and gives no sign of life."""
    more = ["--run_dir", str(tmp_path / "run"), "--rank_timeout", "5", *fault(rank=1, kind=kind)]
    pids, outs = ranks([*args, *more], [tmp_path] * 2)
    if kind == "hang":
        until(lambda: "distilling" in outs[0].read_text() if outs[0].exists() else False)
        time.sleep(1)
        os.kill(pids[1], signal.SIGSTOP)
    assert code_of(pids[0], 60) == 2
    said = outs[0].read_text()
    assert said.count("spar fit: error: ") == 1 and "--resume auto" in said and "Traceback" not in said
    os.kill(pids[1], signal.SIGKILL)
    os.waitpid(pids[1], 0)


def test_a_rank_that_does_not_see_the_checkpoint(args: list[str], tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    more = ["--run_dir", "run", "--resume", "auto", "--trainer.max_epochs"]
    pids, outs = ranks([*args, *more, "1"], [folders[0]] * 2)
    assert [code_of(pid, 60) for pid in pids] == [0, 0], outs[0].read_text()
    pids, outs = ranks([*args, *more, "2"], folders)
    assert [code_of(pid, 60) for pid in pids] == [2, 2]
    said = "".join(out.read_text() for out in outs)
    assert "Rank 1 finds no checkpoint to resume from, but rank 0 finds last.ckpt of step 6" in said
    assert not list(folders[1].glob("run/checkpoints/*"))


def test_a_loader_process_that_is_killed(args: list[str], tmp_path: Path) -> None:
    one = [*args, "--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.max_epochs", "100"]
    out = tmp_path / "out"
    pid = task([*one, "--run_dir", str(tmp_path / "run"), "--data.num_workers", "1"], {}, out)
    until(lambda: (tmp_path / "run" / "checkpoints" / "epoch.ckpt").exists())
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert code_of(pid, SOON) == 2
    said = out.read_text()
    assert "A loader process was ended by the system" in said and "Traceback" not in said
