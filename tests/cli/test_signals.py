"""Tests of signals: a command stops by itself, with a checkpoint to continue from and the right exit code."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from spar_lightning.cli import main
from spar_lightning.stopping import in_loader_process
from tests.cli.test_nodes import task, until

WITHIN = 30.0  # seconds


def code_of(pid: int, seconds: float = WITHIN) -> int:
    """Return the exit code of a forked process that must end within some seconds."""
    until(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None, seconds)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def rows(run: Path, key: str) -> dict[int, float]:
    """Return a metric of a run by step; no step may have been logged twice."""
    path = run / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    pairs = [(row["step"], row[key]) for row in found if key in row]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def state(run: Path) -> dict[str, Any]:
    """Return the last checkpoint of a run."""
    loaded: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return loaded


def slow(**seconds: float) -> list[str]:
    """Return the arguments that slow a run down."""
    settings = [f"--trainer.callbacks.{name}={value}" for name, value in seconds.items()]
    return ["--trainer.callbacks+=tests.faults.Slow", *settings]


@pytest.fixture(scope="module")
def fit(small: list[str], scenes: Path) -> list[str]:
    """Return the arguments of a run of 4 epochs with 12 steps each and a validation at the end of each epoch."""
    return ["fit", *small, "--data.root", str(scenes), "--trainer.max_epochs", "4", "--mean_iou.before", "false",
            "--mean_iou.teacher", "false"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(fit: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an undisturbed run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main([*fit, "--run_dir", str(run)]) == 0
    return run


@pytest.mark.parametrize(("numbers", "code"), [
    pytest.param(["SIGINT"] * 2, 130, marks=pytest.mark.slow), (["SIGTERM", "SIGUSR1"], 143),
])  # fmt: skip
def test_a_stopped_run_continues_bit_identically(
    numbers: list[str], code: int, fit: list[str], whole: Path, tmp_path: Path
) -> None:
    """Once during a step of the second epoch, and once during the validation at the end of the third."""
    cut = tmp_path / "cut"
    cut_args = [*fit, "--run_dir", str(cut), "--resume", "auto"]

    pid = task([*cut_args, *slow(step=0.05)], {}, tmp_path / "first")
    until(lambda: max(rows(cut, "loss"), default=0) >= 14)
    os.kill(pid, signal.Signals[numbers[0]])
    assert code_of(pid) == code
    said = (tmp_path / "first").read_text()
    assert "Traceback" not in said and f"--run_dir {cut} " in said and said.endswith("--resume auto\n")
    stopped = state(cut)["global_step"]
    assert stopped == max(rows(cut, "loss")) + 1

    pid = task([*cut_args, *slow(validation=0.3)], {}, tmp_path / "second")
    until(lambda: max(rows(cut, "loss"), default=0) == 35)
    time.sleep(0.5)  # the validation takes 3 s
    os.kill(pid, signal.Signals[numbers[1]])
    sent = time.monotonic()
    assert code_of(pid) == code
    assert time.monotonic() - sent < 2
    assert state(cut)["global_step"] == 36 and 35 not in rows(cut, "mIoU/mean")

    assert main(cut_args) == 0
    assert rows(cut, "mIoU/mean") == rows(whole, "mIoU/mean") and rows(cut, "loss") == rows(whole, "loss")
    for name, tensor in state(whole)["state_dict"].items():
        assert torch.equal(tensor, state(cut)["state_dict"][name]), name


def test_a_second_signal_stops_at_once(fit: list[str], tmp_path: Path) -> None:
    pid = task([*fit, "--run_dir", str(tmp_path / "run"), *slow(step=60)], {}, tmp_path / "out")
    until(lambda: (tmp_path / "out").exists() and "distilling" in (tmp_path / "out").read_text())
    os.kill(pid, signal.SIGTERM)
    time.sleep(1.5)
    assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    os.kill(pid, signal.SIGTERM)
    assert code_of(pid, 2) == 143
    assert "Stopped at once" in (tmp_path / "out").read_text()


def test_a_cache_and_an_evaluation_stop_at_once(small: list[str], tmp_path: Path) -> None:
    data = ["--data.root", str(tmp_path / "scenes"), "--data.train_scenes", "300", "--data.val_scenes", "200"]
    pid = task(["cache", *small, *data, "--windows_per_second", "400"], {}, tmp_path / "cache")
    claims = tmp_path / "scenes" / "seed-0" / "cache" / "claims"
    until(lambda: claims.exists() and any(claims.glob("*.h5")))
    time.sleep(0.5)  # a shard takes seconds
    os.kill(pid, signal.SIGTERM)
    assert code_of(pid, 8) == 143
    said = (tmp_path / "cache").read_text()
    assert "To continue, run the same command again" in said and "Traceback" not in said
    assert not list(claims.iterdir())  # other processes need not wait for these leases

    out = tmp_path / "results"
    pid = task(["evaluate", *small, *data, "--inference", "sliding", "--out", str(out)], {}, tmp_path / "evaluate")
    until(lambda: (tmp_path / "evaluate").exists() and "image/s" in (tmp_path / "evaluate").read_text())
    os.kill(pid, signal.SIGUSR1)
    assert code_of(pid, 8) == 143
    assert "To continue, run the same command again" in (tmp_path / "evaluate").read_text()


def test_a_signal_that_is_not_listed_keeps_its_meaning(fit: list[str], tmp_path: Path) -> None:
    args = [*fit, "--run_dir", str(tmp_path / "run"), "--stop_signals", "[SIGUSR2]", *slow(step=0.1)]
    pid = task(args, {}, tmp_path / "out")
    until(lambda: len(rows(tmp_path / "run", "loss")) > 2)
    os.kill(pid, signal.SIGUSR1)
    assert code_of(pid) == -signal.SIGUSR1


def test_a_loader_process_ignores_the_signals_of_others_and_ends_with_its_parent(tmp_path: Path) -> None:
    parent = os.fork()
    if parent == 0:
        child = os.fork()
        if child == 0:
            in_loader_process()
            (tmp_path / "ready").touch()
            time.sleep(60)
        (tmp_path / "child").write_text(str(child))
        time.sleep(60)
    until((tmp_path / "ready").exists)
    child = int((tmp_path / "child").read_text())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(child, number)  # not from its parent
    time.sleep(0.3)
    os.kill(child, 0)  # raises if the process has ended
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2], 5)
