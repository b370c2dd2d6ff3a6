"""Kill `spar fit` at random moments, resume it, and compare its final weights with those of an uninterrupted run.

    python scripts/crash_fit.py --kills 20 --processes 1 --workers 2
    python scripts/crash_fit.py --kills 20 --processes 2 --signal SIGTERM

All processes of a run are killed with SIGKILL at once, as in a crash of the machine. SIGTERM and SIGUSR1 are sent to
one process or to all, by chance, as by a scheduler; the run must then end by itself within 30 s with exit code 143. The
run is continued with `--resume auto` from the last checkpoint. The script prints its counts and exits with status 1
unless all weights and validation results are bit-identical and, except after SIGKILL, no step was trained twice.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from spar_lightning.cli import main as spar

QUICKSTART = Path(__file__).parents[1] / "spar_lightning" / "configs" / "quickstart.yaml"


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(args: list[str], processes: int, log: Path) -> list[int]:
    """Fork the ranks of one `spar fit` and return their process IDs; starting a new Python would take longer.

    Args:
        args: Arguments of `spar`.
        processes: Number of ranks.
        log: File to which the processes append their output.
    """
    port, pids = free_port(), []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                if processes > 1:  # the variables that torchrun sets
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0")
                    os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
                    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="crash_fit")
                os.setsid()  # so that loader processes are killed with it
                code = spar(args)
            finally:
                os._exit(code)
        pids.append(pid)
    return pids


def kill(pids: list[int]) -> bool:
    """Kill a run and its loader processes; return False if it had already ended."""
    killed = True
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    for pid in pids:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"spar fit failed with exit code {code} before it was killed")
        killed &= code == -signal.SIGKILL
    return killed


def stop(pids: list[int], number: int, one: bool, dice: random.Random) -> tuple[bool, float]:
    """Send a signal to one rank or to all.

    Args:
        pids: Process IDs of the ranks.
        number: Number of the signal.
        one: Whether a signal to one rank is enough: before the ranks are connected, only a launcher can end the others.
        dice: Random numbers.

    Returns:
        Whether the run stopped (it may have ended before), and the seconds until its last process ended.
    """
    sent = time.monotonic()
    for pid in dice.choice([pids, [dice.choice(pids)] if one else pids]):
        os.kill(pid, number)
    while not all(map(ended, pids)) and time.monotonic() - sent < 60:
        time.sleep(0.01)
    seconds = time.monotonic() - sent
    if not all(map(ended, pids)):
        kill(pids)
        raise RuntimeError(f"spar fit did not end within {seconds:.0f} s after {signal.Signals(number).name}")
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if codes not in ([143] * len(pids), [0] * len(pids)):
        raise RuntimeError(f"spar fit ended with exit codes {codes} after {signal.Signals(number).name}")
    return codes[0] == 143, seconds


def logged(run: Path) -> tuple[int, dict[int, float]]:
    """Return how many steps of a run were logged more than once, and its validation results by step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = Counter(row["step"] for row in rows if "loss" in row)
    return sum(n > 1 for n in trained.values()), {row["step"]: row["mIoU/mean"] for row in rows if "mIoU/mean" in row}


def ended(pid: int) -> bool:
    """Return whether a process has ended, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the student in the last checkpoint of a run."""
    state: dict[str, torch.Tensor] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def step(run: Path) -> int:
    """Return the optimizer step of the last checkpoint of a run; 0 if it has none."""
    path = run / "checkpoints" / "last.ckpt"
    return int(torch.load(path, weights_only=True)["global_step"]) if path.exists() else 0


def main() -> int:
    """Train, kill and resume until enough runs were killed; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--signal", choices=["SIGKILL", "SIGTERM", "SIGUSR1"], default="SIGKILL")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="crash_fit-") as place:
        root = Path(place)
        args = [
            "fit", "--config", str(QUICKSTART), "--data.root", str(root / "scenes"), "--data.train_scenes", "60",
            "--data.val_scenes", "2", "--data.val_sizes", "[64]", "--data.batch_size", "1",
            "--trainer.max_epochs", str(given.epochs), "--data.num_workers", str(given.workers),
            "--checkpoint_every_n_steps", "7", "--trainer.log_every_n_steps", "1", "--mean_iou.before", "false",
            "--mean_iou.teacher", "false", "--trainer.accelerator", "cpu",
            *(["--trainer.devices", str(given.processes), "--trainer.strategy", "ddp"] if given.processes > 1 else []),
        ]  # fmt: skip
        log = root / "log"
        began = time.monotonic()
        for pid in start([*args, "--run_dir", str(root / "whole")], given.processes, log):
            if os.waitpid(pid, 0)[1]:
                raise RuntimeError(log.read_text()[-3000:])
        undisturbed = time.monotonic() - began
        steps = step(root / "whole")

        number = signal.Signals[given.signal]
        kills, runs, saved, different, twice, slowest = 0, 0, set[int](), 0, 0, 0.0
        while kills < given.kills:
            run = root / f"run-{runs}"
            resume: list[str] = []
            while True:
                before = len(log.read_text())
                pids = start([*args, "--run_dir", str(run), *resume], given.processes, log)
                deadline = time.monotonic() + dice.uniform(0.1, 0.5) * undisturbed
                while time.monotonic() < deadline and not any(map(ended, pids)):
                    time.sleep(0.01)
                if any(map(ended, pids)):
                    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
                    if any(codes):
                        raise RuntimeError(f"spar fit failed with exit codes {codes}:\n{log.read_text()[-3000:]}")
                    break
                if number == signal.SIGKILL:
                    kills += kill(pids)
                else:
                    connected = log.read_text()[before:].count("run folder") > 0
                    stopped, seconds = stop(pids, number, connected, dice)
                    kills, slowest = kills + stopped, max(slowest, seconds)
                    if not stopped:
                        break
                saved.add(step(run))
                resume = ["--resume", "auto"]
            whole, found = weights(root / "whole"), weights(run)
            different += sum(not torch.equal(whole[name], found[name]) for name in whole)
            repeated, results = logged(run)
            twice += repeated
            different += results != logged(root / "whole")[1]
            runs += 1
            print(f"run {runs}: {kills} kills so far, checkpoints resumed from: {sorted(saved)}", flush=True)
    print(
        f"{kills} times {given.signal} over {runs} runs of {steps} steps, {given.processes} ranks with "
        f"{given.workers} loader workers each, resumed from {len(saved)} different steps: {different} of "
        f"{runs * len(whole)} tensors differ from the uninterrupted run; {twice} steps trained twice"
        + (f"; slowest end after {slowest:.1f} s" if slowest else "")
    )
    return 1 if different or slowest > 30 or (twice and number != signal.SIGKILL) else 0


if __name__ == "__main__":
    sys.exit(main())
