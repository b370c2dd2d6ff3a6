"""Test of a network that fails between two hosts: two network namespaces, joined by a pair of virtual interfaces."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.cli.test_nodes import until
from tests.conftest import environment

TIMEOUT = 20  # seconds; --rank_timeout
HOSTS = ("10.80.0.1", "10.80.0.2")


def ip(*args: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Return the names of two namespaces with an address each; their interfaces are called a0 and b0."""
    names = [f"spar-{os.getpid()}-{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "a0", "netns", names[0], "type", "veth", "peer", "name", "b0", "netns", names[1])
        for name, side, address in zip(names, ("a0", "b0"), HOSTS, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", side)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", side, "up")
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        for name in names:
            with suppress(FileNotFoundError, subprocess.CalledProcessError):
                ip("netns", "del", name)
        pytest.skip(f"network namespaces cannot be created here: {getattr(error, 'stderr', error)}")
    yield names
    for name in names:
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout
        for pid in pids.split():
            os.kill(int(pid), 9)
        ip("netns", "del", name)


def start(hosts: list[str], args: list[str], outs: list[Path]) -> list["subprocess.Popen[bytes]"]:
    """Run `spar` under torchrun with one process on each host."""
    agents = []
    for rank, (host, out) in enumerate(zip(hosts, outs, strict=True)):
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                 "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOSTS[0]}:29500", "--local-addr", HOSTS[rank],
                 "--rdzv-conf", f"is_host={rank == 0}"]  # fmt: skip
        env = {**environment(), "GLOO_SOCKET_IFNAME": ("a0", "b0")[rank]}
        command = ["ip", "netns", "exec", host, *agent, "-m", "spar_lightning", *args]
        with out.open("wb") as file:
            agents.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env))
    return agents


@pytest.mark.slow
def test_a_cut_link_ends_both_sides_and_the_run_continues_later(
    hosts: list[str], small: list[str], scenes: Path, tmp_path: Path
) -> None:
    run, outs = tmp_path / "run", [tmp_path / "out-a", tmp_path / "out-b"]
    args = ["fit", *small, "--data.root", str(scenes), "--run_dir", str(run), "--resume", "auto",
            "--mean_iou.before", "false", "--mean_iou.teacher", "false", "--rank_timeout", str(TIMEOUT),
            "--checkpoint_every_n_steps", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp",
            "--trainer.num_nodes", "2", "--trainer.devices", "1"]  # fmt: skip
    slow = ["--trainer.callbacks+=tests.faults.Slow", "--trainer.callbacks.step=0.2"]
    agents = start(hosts, [*args, "--trainer.max_epochs", "1000", *slow], outs)
    last = run / "checkpoints" / "last.ckpt"
    until(lambda: last.exists() or any(agent.poll() is not None for agent in agents), 180)
    time.sleep(3)
    ip("-n", hosts[0], "link", "set", "a0", "down")
    cut = time.monotonic()
    seconds: dict[int, float] = {}
    while len(seconds) < 2 and time.monotonic() - cut < 120:
        seconds.update(
            {i: time.monotonic() - cut for i, a in enumerate(agents) if a.poll() is not None and i not in seconds}
        )
        time.sleep(0.1)
    print(f"seconds from the cut until the end of torchrun on each side: {seconds}")
    said = [out.read_text() for out in outs]
    assert set(seconds) == {0, 1} and max(seconds.values()) < 3 * TIMEOUT, said
    for other, text in zip((1, 0), said, strict=True):
        assert f"spar fit: error: No sign of life from rank {other} for {TIMEOUT} s" in text and "--resume auto" in text
    steps = torch.load(last, weights_only=True)["global_step"]

    ip("-n", hosts[0], "link", "set", "a0", "up")
    agents = start(hosts, [*args, "--trainer.max_steps", str(steps + 4), "--trainer.max_epochs", "1000"], outs)
    assert [agent.wait(180) for agent in agents] == [0, 0], [out.read_text() for out in outs]
    assert "resumed from" in outs[0].read_text()
    assert torch.load(last, weights_only=True)["global_step"] == steps + 4
