"""Tests on two nodes: torchrun agents on the loopback interface, and SLURM simulated by a script."""

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spar_lightning.backbones import Tiny
from spar_lightning.cli import main
from tests.conftest import ROOT, environment

SRUN = """#!/bin/sh
printf '%s\\n' "$@" > "$TASK"
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


def handed_to_srun(script: str, args: list[str], variables: dict[str, str], folder: Path) -> list[str]:
    """Return the arguments of `spar` that an unmodified script of examples/slurm passes to srun."""
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(stat.S_IRWXU)
    where = {"PATH": f"{folder}:{os.environ['PATH']}", "TASK": str(folder / "task")}
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "slurm" / script), *args],
        capture_output=True, text=True, timeout=300, env={**environment(), **variables, **where},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    spar, *task = (folder / "task").read_text().splitlines()
    assert spar == "spar"
    return task


def test_the_slurm_scripts(small: list[str], tmp_path: Path) -> None:
    """Features from a job of the array, then the two tasks of srun with SLURM's environment variables."""
    variables = {
        "SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NAME": "spar-fit", "SLURM_NNODES": "2", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    assert small[0] == "--config"
    run, data = tmp_path / "run", ["--data.root", str(tmp_path / "scenes")]
    more = [*data, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--run_dir", str(run)]
    more += ["--mean_iou.before", "false", "--mean_iou.teacher", "false"]
    scripts = ("cache.sbatch", "fit.sbatch")
    cache, fit = (handed_to_srun(name, [*small[1:], *more], variables, tmp_path) for name in scripts)
    assert main(cache) == 0
    shards = list((tmp_path / "scenes" / "seed-0" / "cache" / "shards").glob("*.h5"))
    assert len(shards) == 1
    made = shards[0].stat().st_mtime_ns

    outs = [tmp_path / "task-0", tmp_path / "task-1"]
    ranks = [{**variables, "SLURM_PROCID": str(i), "SLURM_NODEID": str(i), "SLURM_LOCALID": "0"} for i in range(2)]
    tasks = [task(fit, rank, out) for rank, out in zip(ranks, outs, strict=True)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in tasks]
    assert codes == [0, 0], [out.read_text() for out in outs]
    shown = outs[0].read_text()
    assert "CPUAccelerator x 2" in shown and shown.count("| single pass, after (SPAR)") == 1
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert shards[0].stat().st_mtime_ns == made  # the features were not computed again
