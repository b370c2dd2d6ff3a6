"""Contact between the ranks of a command, besides collectives: signs of life, errors and stop requests.

A rank that waits in a collective for another one cannot learn that the other has failed. Each rank therefore has a
thread that exchanges messages over a TCP store on rank 0. An error on any rank ends all ranks within seconds, with one
message; a lost machine or connection ends them after a time-out.
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not in __all__

from spar_lightning.cli.error_messages import explained
from spar_lightning.errors import UserError
from spar_lightning.stopping import GRACE, Stopped, signals

BEAT: Final = 0.5  # seconds between two exchanges
SUSPENDED: Final = 3.0  # seconds between two checks that show that the process did not run
ANSWER: Final = 3.0  # seconds in which torchrun reacts to SIGTERM
NEWS: Final = 3.0  # seconds in which the reason of a broken connection arrives
BROKEN: Final = re.compile(r"gloo|NCCL|connection|broken pipe|socket|TCPStore|timed out", re.IGNORECASE)


class Contact:
    """Exchange of messages with the other ranks, in a thread.

    Args:
        command: Name of the command.
        store: Store that all ranks share.
        rank: Rank of this process.
        world_size: Number of ranks.
        timeout: Seconds without a sign of life from another rank after which this process ends.
    """

    def __init__(self, command: str, store: TCPStore, rank: int, world_size: int, timeout: float) -> None:
        self.prefix = f"spar {command}: error:"
        self.store, self.rank, self.timeout = store, rank, timeout
        self.others = range(1, world_size) if rank == 0 else range(1)  # all ranks talk to rank 0
        self._checked = time.monotonic()
        self._heard = dict.fromkeys(self.others, self._checked)
        self._count = dict.fromkeys(self.others, 0)
        self._left: set[int] = set()
        self._told = False  # this rank has told the others why it ends
        if rank == 0:
            store.set("host", socket.gethostname())
        self._near = store.get("host").decode() == socket.gethostname()  # on the machine of rank 0, or rank 0 itself
        self._closed = threading.Event()
        self._broken = 0.0  # time at which the store could not be reached any more
        self._alone = 0.0  # time at which another rank was found to have stopped
        signals.on_request.append(self.request)
        signals.checks.append(self._check)
        self._thread = threading.Thread(target=self._exchange, daemon=True, name="contact")
        self._thread.start()

    def request(self, number: int) -> None:
        """Pass a signal on to all ranks."""
        with suppress(RuntimeError):  # no connection
            self.store.compare_set("stop", "", str(int(number)))

    def _exchange(self) -> None:
        """Exchange messages until the contact is closed or the connection breaks."""
        try:
            while not self._closed.wait(BEAT):
                self.store.add(f"beat-{self.rank}", 1)
                for other in self.others:
                    count = self.store.add(f"beat-{other}", 0)
                    if count != self._count[other]:
                        self._count[other], self._heard[other] = count, time.monotonic()
                    if self.store.check([f"left-{other}"]):
                        self._left.add(other)
                if self.store.check(["error"]) and not self._told:
                    self._end_with(json.loads(self.store.get("error")))
                if self.store.check(["stop"]) and signals.requested is None:
                    os.kill(os.getpid(), int(self.store.get("stop")))
        except RuntimeError:  # the process of rank 0 has ended, or the network is down
            self._broken = time.monotonic()

    def _end_with(self, error: dict[str, Any]) -> None:
        """End this process because of an error on another rank."""
        if error["text"] is None:
            time.sleep(1)  # that rank prints a traceback
        elif self.rank == 0 or not self._near:
            where = "" if error["host"] == socket.gethostname() else f" (rank {error['rank']} on {error['host']})"
            print(f"\n{error['text']}{where}", file=sys.stderr)
        self._leave()
        signals.end(error["code"])

    def _leave(self) -> None:
        self._told = True
        with suppress(RuntimeError):
            self.store.add(f"left-{self.rank}", 1)

    def _check(self) -> None:
        """End this process if another rank has been silent for too long, or has stopped and left this one behind."""
        now = time.monotonic()
        if self._closed.is_set() or self._told:
            return
        if signals.requested is not None:
            self._alone = self._alone or (now if self._left or self._broken else 0.0)
            if self._alone and now - self._alone > GRACE:
                signals.end(Stopped(signals.requested).code)
            return
        if self._broken and now - self._broken > NEWS:
            self._lose(_lost("rank 0"))
        if now - self._checked > SUSPENDED:  # this process was suspended, and the other ranks probably, too
            self._heard = dict.fromkeys(self.others, now)
        self._checked = now
        for other, heard in self._heard.items():
            if other not in self._left and now - heard > self.timeout:
                self._lose(_lost(f"rank {other}", self.timeout))

    def _lose(self, text: str) -> None:
        print(f"\n{self.prefix} {text}", file=sys.stderr)
        self._end_launcher()
        signals.end(2)

    def _end_launcher(self) -> None:
        """End torchrun on a machine that has lost the one of rank 0, for which it would wait for many minutes."""
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("GROUP_RANK", "0") != "0":
            agent = os.getppid()
            os.kill(agent, signal.SIGTERM)
            if not signals.arrives(ANSWER):  # it passes SIGTERM on, unless it waits for a reply of that machine
                os.kill(agent, signal.SIGKILL)

    def explain(self, error: Exception) -> None:
        """Tell the other ranks about an error of this one, or end because it follows from an error of another one.

        Raises:
            Stopped: The other rank has ended because the command was asked to stop.
            UserError: The connection to another rank is broken, and no rank has told why.
            SystemExit: Rank 0, on the same machine, prints the message.
        """
        text = explained(error)
        if text is None and isinstance(error, RuntimeError) and BROKEN.search(str(error)):
            time.sleep(NEWS)  # if another rank has told its error, the thread ends this process now
            if signals.requested is not None:  # that rank has stopped, this one would have at the end of its step
                raise Stopped(signals.requested) from error
            text = _lost("another rank")
        where = {"rank": self.rank, "host": socket.gethostname(), "code": 1 if text is None else 2}
        mine = json.dumps({**where, "text": text and f"{self.prefix} {text}"})
        told = False
        with suppress(RuntimeError):
            found = self.store.compare_set("error", "", mine).decode()
            if found != mine:
                self._end_with(json.loads(found))
            told = self._told = True
        if not told:
            self._end_launcher()
        if text is None:
            return
        if told and self.rank and self._near:
            raise SystemExit(2) from error
        raise UserError(text) from error

    def close(self, wait: float) -> None:
        """End the exchange; rank 0, which holds the store, first waits until the other ranks have ended theirs."""
        deadline = time.monotonic() + wait
        if self.rank == 0:
            while not self._broken and not self._left.issuperset(self.others) and time.monotonic() < deadline:
                time.sleep(0.05)
        self._leave()
        self._closed.set()
        signals.on_request.remove(self.request)
        signals.checks.remove(self._check)


def _lost(other: str, seconds: float | None = None) -> str:
    what = f"Lost the connection to {other}" if seconds is None else f"No sign of life from {other} for {seconds:.0f} s"
    return (
        f"{what}: its process or machine has ended, or the network is down. To continue a run from its last "
        "checkpoint: --resume auto. The time-out is --rank_timeout."
    )


@contextmanager
def contact(
    command: str, rank: int, world_size: int, address: str, broadcast: Callable[[Any], Any], timeout: float
) -> Iterator[None]:
    """Keep contact between all ranks while the block runs; collectives must work already.

    Args:
        command: Name of the command, for messages.
        rank: Rank of this process.
        world_size: Number of ranks.
        address: Name or address of the machine of rank 0.
        broadcast: Function that returns the argument of rank 0 on all ranks.
        timeout: Seconds without a sign of life from another rank after which a process ends.
    """
    wait = timedelta(seconds=timeout)
    server = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=wait) if rank == 0 else None
    port = broadcast(server.port if server else None)
    store = server or TCPStore(address, port, is_master=False, timeout=wait)
    ours = Contact(command, store, rank, world_size, timeout)
    try:
        yield
    except Stopped as stopped:
        ours.request(stopped.number)  # the thread may not have come to it yet
        ours.close(NEWS)
        raise
    except Exception as error:
        try:
            ours.explain(error)
            raise
        finally:
            ours.close(NEWS)
    ours.close(timeout)
