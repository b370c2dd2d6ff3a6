"""Tests on two nodes: torchrun agents on the loopback interface, and SLURM simulated by a script."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spar_lightning.backbones import Tiny
from spar_lightning.cli import main
from tests.conftest import ROOT, environment

# A stand-in for srun: hands its arguments over, waits for the tasks to be run by the test, and ends with their code.
SRUN = """#!/bin/sh
rm -f "$TASK.code"
printf '%s\\n' "$@" > "$TASK.new"
mv "$TASK.new" "$TASK"
while [ ! -e "$TASK.code" ]; do sleep 0.1; done
exit "$(cat "$TASK.code")"
"""

SCONTROL = """#!/bin/sh
echo "$@" >> "$TASK.requeued"
"""


def task(args: list[str], variables: dict[str, str], out: Path) -> int:
    """Run a command in a fork of this process, to save the imports; return the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with out.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os.environ.update(variables)
        code = main(args)
    finally:
        os._exit(code)


def results(folder: Path) -> dict[str, Any]:
    """Return the validation results of a run by stage."""
    return {row["stage"]: row for row in json.loads((folder / "results.json").read_text())}


def student(run: Path) -> Tiny:
    """Return the trained student of a run."""
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    tiny = Tiny(pretrained=None)
    tiny.load_vision_state_dict({name.removeprefix("student."): tensor for name, tensor in state.items()})
    return tiny


def free_port() -> int:
    """Return a free TCP port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.slow
def test_cache_fit_and_validate_under_torchrun(small: list[str], tmp_path: Path) -> None:
    """One process with two images per step equals two nodes with one image each."""

    def args(verb: str, name: str, *more: str) -> list[str]:
        where = ["--data.root", str(tmp_path / name), "--trainer.max_epochs", "1", *more]
        ends = {
            "cache": [],
            "fit": ["--run_dir", str(tmp_path / f"run-{name}")],
            "validate": ["--weights", str(tmp_path / f"run-{name}" / "checkpoints" / "best.ckpt")],
        }
        return [verb, *small, *where, *ends[verb]]

    assert main(args("fit", "one", "--data.batch_size", "2")) == 0
    nodes = ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp"]
    nodes += ["--trainer.accelerator", "cpu"]
    verbs = [args(verb, "two", *nodes) for verb in ("cache", "fit", "validate")]
    script = tmp_path / "verbs.py"  # all commands in one process, to import torch only once
    script.write_text(f"from spar_lightning.cli import main\nfor args in {verbs!r}:\n    assert main(args) == 0\n")
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    agent += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    agents = [
        subprocess.Popen(
            [*agent, "--node-rank", str(rank), str(script)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
        )
        for rank in range(2)
    ]  # fmt: skip
    outs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outs
    assert outs[0].count("12 of 12 images have features") == 1 and "images have features" not in outs[1]
    assert outs[0].count("| sliding window (teacher)") == 1 and "mIoU" not in outs[1]  # only the first process prints

    shards = [tmp_path / name / "seed-0" / "cache" / "shards" / "00000.h5" for name in ("one", "two")]
    assert shards[0].read_bytes() == shards[1].read_bytes()
    expected, found = results(tmp_path / "run-one"), results(tmp_path / "run-two")
    for stage in ("before", "teacher"):
        assert found[stage]["miou"] == expected[stage]["miou"]
    assert found["after"]["images"] == {"scenes_64": 5, "scenes_96": 5}
    # Compare features, not weights: the gradient of the key bias is rounding error, which Adam scales to a full step.
    image = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = [student(tmp_path / f"run-{name}")(Tiny().normalize(image)) for name in ("one", "two")]
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=1e-3)
    assert not torch.allclose(features[0], Tiny()(Tiny().normalize(image)), rtol=0, atol=0.1)
    assert found["after"]["miou"] == pytest.approx(expected["after"]["miou"], abs=0.01)
    # Another number of processes can resume from the end of an epoch: 6 steps of two images, then 12 of one.
    end = str(tmp_path / "run-two" / "checkpoints" / "epoch.ckpt")
    where = ["--data.root", str(tmp_path / "two"), "--run_dir", str(tmp_path / "run-more")]
    assert main(["fit", *small, *where, "--trainer.max_epochs", "2", "--resume", end]) == 0
    more = torch.load(tmp_path / "run-more" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (more["epoch"], more["global_step"]) == (1, 18)
    validated = [line for line in outs[0].splitlines() if line.startswith("| scenes_96")][-1]
    assert f"{found['after']['miou']['scenes_96']:.1f}" in validated


class Job:
    """A job that runs an unmodified script of examples/slurm with stand-ins for srun and scontrol."""

    def __init__(self, script: str, args: list[str], variables: dict[str, str], folder: Path) -> None:
        self.task, self.requeued = folder / "task", folder / "task.requeued"
        self.task.unlink(missing_ok=True)
        for name, content in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (folder / name).write_text(content)
            (folder / name).chmod(stat.S_IRWXU)
        self.variables = {**variables, "PATH": f"{folder}:{os.environ['PATH']}", "TASK": str(self.task)}
        command = ["bash", str(ROOT / "examples" / "slurm" / script), *args]
        self.process = subprocess.Popen(command, env={**environment(), **self.variables})

    def handed_over(self) -> list[str]:
        """Return the arguments of `spar` that the script passes to srun."""
        while not self.task.exists():
            assert self.process.poll() is None
            time.sleep(0.05)
        options, _, spar = self.task.read_text().partition("spar\n")
        assert all(option.startswith("--") for option in options.split())
        return spar.splitlines()

    def end(self, code: int) -> int:
        """Let srun end with this exit code; return that of the script."""
        self.task.with_suffix(".code").write_text(str(code))
        return self.process.wait(30)


@pytest.mark.slow
def test_the_slurm_scripts(small: list[str], tmp_path: Path) -> None:
    """Features from a job of the array, then two tasks of a run that is stopped and requeued three times."""
    variables = {
        "SLURM_JOB_ID": "1234567", "SLURM_JOB_NAME": "spar-fit", "SLURM_NNODES": "2", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "127.0.0.1", "SLURM_STEP_ID": "0",
    }  # fmt: skip
    assert small[0] == "--config"
    run, data = tmp_path / "run", ["--data.root", str(tmp_path / "scenes")]
    more = [*small[1:], *data, "--trainer.max_epochs", "4", "--trainer.accelerator", "cpu", "--run_dir", str(run)]
    more += ["--mean_iou.before", "false", "--mean_iou.teacher", "false"]
    cache = Job("cache.sbatch", more, variables, tmp_path)
    assert main(cache.handed_over()) == 0
    assert cache.end(0) == 0
    shards = list((tmp_path / "scenes" / "seed-0" / "cache" / "shards").glob("*.h5"))
    assert len(shards) == 1
    made = shards[0].stat().st_mtime_ns

    steps: list[int] = []
    outs = [tmp_path / "out-0", tmp_path / "out-1"]
    slow = ["--trainer.callbacks+=tests.faults.Slow", "--trainer.callbacks.step=0.05"]
    for restart in range(4):
        job = Job("fit.sbatch", [*more, *slow], {**variables, "MASTER_PORT": str(free_port())}, tmp_path)
        fit = job.handed_over()
        of_rank = [
            {**job.variables, "SLURM_PROCID": str(i), "SLURM_NODEID": str(i), "SLURM_LOCALID": "0"} for i in (0, 1)
        ]
        tasks = [task(fit, variables, out) for variables, out in zip(of_rank, outs, strict=True)]
        if restart < 3:
            until(lambda: logged(run) > (steps[-1] if steps else 0) + 2)
            for pid in tasks:
                os.kill(pid, signal.SIGUSR1)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in tasks]
        assert codes == ([143, 143] if restart < 3 else [0, 0]), [out.read_text() for out in outs]
        assert job.end(max(codes)) == max(codes)
        requeued = job.requeued.read_text().splitlines()
        assert requeued == ["requeue 1234567"] * min(restart + 1, 3)
        steps.append(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])
    assert steps == sorted(set(steps)) and steps[-1] == 24
    shown = outs[0].read_text()
    assert "CPUAccelerator x 2" in shown and shown.count("| single pass, after (SPAR)") == 1
    trained = [
        row["step"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row
    ]
    assert trained == list(range(24))  # no step twice
    assert shards[0].stat().st_mtime_ns == made  # the features were not computed again


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def logged(run: Path) -> int:
    """Return the number of lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0
