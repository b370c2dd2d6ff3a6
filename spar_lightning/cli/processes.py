"""Processes of a command on one machine: the first starts one for each further device, and they end together.

torchrun and srun start all processes themselves. Lightning could start them, too, but it answers the end of one with
SIGKILL for all, the first included, so that neither its exit code nor its message reaches the user.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final

from spar_lightning.stopping import signals

PARENT: Final = "SPAR_PARENT"  # environment variable: process ID of the process that started this one
VARIABLES: Final = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
SLOW: Final = 2.0  # seconds in which the reason for the end of a process arrives in another way (see `cli.contact`)


class Processes:
    """Further processes of this command, with the environment variables that Lightning expects.

    They receive the signals of the first process and are killed when it ends early.

    Args:
        args: Arguments of `spar`.
        count: Number of processes on this machine, including this one.
        nodes: Number of machines.
    """

    def __init__(self, args: Sequence[str], count: int, nodes: int = 1) -> None:
        self._before = {name: os.environ.get(name) for name in VARIABLES}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        os.environ.setdefault("NODE_RANK", "0")
        os.environ.update(WORLD_SIZE=str(count * nodes), LOCAL_RANK="0")
        command = [sys.executable, "-m", "spar_lightning", *args]
        self.children = [
            # A session of its own: Ctrl-C in a terminal reaches the first process only, which passes it on.
            subprocess.Popen(
                command,
                env={**os.environ, "LOCAL_RANK": str(rank), PARENT: str(os.getpid())},
                start_new_session=True,
            )
            for rank in range(1, count)
        ]
        self._failed = 0.0  # time at which a child was found to have failed
        signals.on_request.append(self.send)
        signals.at_once.append(self.kill)

    def send(self, number: int) -> None:
        """Send a signal to the processes that have not ended."""
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)

    def kill(self) -> None:
        """Kill the processes that have not ended."""
        self.send(signal.SIGKILL)

    def wait(self, seconds: float | None = None) -> list[int]:
        """Wait until all processes have ended, or kill them after some seconds; return their exit codes."""
        deadline = None if seconds is None else time.monotonic() + seconds
        for child in self.children:
            try:
                child.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()
        return [child.wait() for child in self.children]

    def check(self) -> None:
        """End this process if one of the others has failed; its message is on the screen already."""
        codes = {rank: child.poll() for rank, child in enumerate(self.children, start=1)}
        failed = {rank: code for rank, code in codes.items() if code}
        if not failed or signals.requested is not None:
            return
        if not self._failed:
            self._failed = time.monotonic()
        elif time.monotonic() - self._failed > SLOW:
            rank, code = next(iter(failed.items()))
            if code < 0:
                name = signal.Signals(-code).name
                print(
                    f"\nspar: error: Process {rank} of this command was ended by {name}, usually because memory ran "
                    "out. Use fewer processes or smaller batches. To continue a run: --resume auto.",
                    file=sys.stderr,
                )
            elif code in (130, 143):  # stopped by a signal that this process did not get
                os.kill(os.getpid(), signal.SIGINT if code == 130 else signal.SIGTERM)
                return
            signals.end(2 if code < 0 else code)

    def close(self) -> None:
        """Kill what is left and restore the environment."""
        self.kill()
        signals.on_request.remove(self.send)
        signals.at_once.remove(self.kill)
        for name, value in self._before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def end_with_parent() -> None:
    """Let this process end when the process that started it has ended, if that was `spar` or torchrun."""
    if PARENT in os.environ and "LOCAL_RANK" in os.environ:
        parent = int(os.environ[PARENT])
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
    else:
        return
    signals.checks.append(lambda: None if os.getppid() == parent else signals.end(1))


def _free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
