"""Stop on a signal: Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 end a command in the same way.

The first signal raises `Stopped` in the main thread. Training defers this to the end of a step, where all ranks save a
checkpoint and stop together. A second signal ends the process at once.

Python runs signal handlers only between two instructions of the main thread, which can wait in a collective for a rank
that has died. A thread therefore also receives the signals, from the file descriptor of `signal.set_wakeup_fd`.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any, Final

from spar_lightning.distributed import is_first_process

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
GRACE: Final = 10.0  # seconds in which the main thread has to react to a signal, outside of training
SAME: Final = 1.0  # seconds; schedulers and launchers send one request several times
TICK: Final = 0.5  # seconds between two calls of the checks


class Stopped(BaseException):
    """Request to stop, raised in the main thread. Not an Exception, so that no library handles it as an error.

    Args:
        number: Signal that was received.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def code(self) -> int:
        """Exit code: 130 for Ctrl-C, 143 for all other signals."""
        return 130 if self.number == signal.SIGINT else 143


class StopSignals:
    """Signal handlers of a command, and a thread that watches over it.

    Attributes:
        requested: First signal that was received, or None.
        checks: Functions that the thread calls every `TICK` seconds.
        on_request: Functions that the thread calls with the number of the first signal.
        at_once: Functions that are called before the process ends without returning to the main thread.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self.checks: list[Callable[[], None]] = []
        self.on_request: list[Callable[[int], None]] = []
        self.at_once: list[Callable[[], None]] = []
        self._nested = 0
        self._deferred = self._raised = False
        self._since = 0.0  # time from which the main thread has to react
        self._first = 0.0  # time of the first signal
        self._previous: dict[int, Any] = {}
        self._wakeup = -1
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None

    @property
    def installed(self) -> bool:
        """True while the handlers are installed in this process."""
        return self._pair is not None

    def __enter__(self) -> "StopSignals":
        """Install the handlers; without effect outside of the main thread or inside another command."""
        if self.installed or threading.current_thread() is not threading.main_thread():
            self._nested += 1
            return self
        self.requested, self._first, self._since = None, 0.0, 0.0
        self._deferred = self._raised = False
        self.checks, self.on_request, self.at_once = [], [], []
        self._pair = socket.socketpair()
        for end in self._pair:
            end.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._pair[1].fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._thread = threading.Thread(target=self._watch, args=(self._pair[0],), daemon=True, name="stop-signals")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the previous handlers and end the thread."""
        if self._nested or self._pair is None or self._thread is None:
            self._nested = max(0, self._nested - 1)
            return
        self._restore()
        signal.set_wakeup_fd(self._wakeup)
        reader, writer = self._pair
        self._pair = None
        writer.send(b"\0")  # closing it would not end the stream: forked processes have a copy
        self._thread.join()
        writer.close()
        reader.close()

    def forget(self) -> None:
        """Restore the previous handlers in a forked process, which has no thread to watch over it."""
        if self._pair is not None:
            self._pair = None
            signal.set_wakeup_fd(-1)
            self._restore()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)

    def choose(self, names: Iterable[str]) -> None:
        """Restore the previous handlers of SIGUSR1 and SIGUSR2 unless they are listed."""
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            if self.installed and number.name not in names:
                signal.signal(number, self._previous[number])

    def defer(self) -> None:
        """Only record the next signal, in `requested`, instead of raising `Stopped`."""
        self._deferred = True

    def resume(self) -> None:
        """End the effect of `defer`.

        Raises:
            Stopped: A signal was received in the meantime.
        """
        self.settle()
        if self.requested is not None and not self._raised:
            self._raised = True
            raise Stopped(self.requested)

    def settle(self) -> None:
        """End the effect of `defer` without raising, while another exception is handled."""
        self._deferred, self._since = False, time.monotonic()

    def arrives(self, seconds: float) -> bool:
        """Return whether a signal arrives within some seconds; it is not handled."""
        return self._pair is not None and bool(select.select([self._pair[0]], [], [], seconds)[0])

    def end(self, code: int) -> None:
        """End the process at once with this exit code, from any thread."""
        for function in self.at_once:
            with suppress(Exception):
                function()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread."""
        if self.requested is None:
            self.requested = number
        if not self._deferred and not self._raised:
            self._raised = True
            raise Stopped(self.requested)

    def _watch(self, reader: socket.socket) -> None:
        """Receive signals and call the checks until the command ends."""
        while True:
            ready, _, _ = select.select([reader], [], [], TICK)
            received = reader.recv(64) if ready else b""
            if 0 in received:
                return
            for number in received:
                if number in SIGNALS and signal.getsignal(number) == self._handle:
                    self._receive(number)
            late = self._first and not self._deferred and time.monotonic() - self._since > GRACE
            if late and self.requested is not None:
                self.end(Stopped(self.requested).code)
            for check in self.checks:
                check()

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if not self._first:
            self.requested, self._first = self.requested or number, now
            self._since = max(self._since, now)
            if self._deferred and is_first_process():
                print("\nStopping at the end of this step. A second signal stops at once.", file=sys.stderr)
            for function in self.on_request:
                function(number)
        elif now - self._first > SAME:
            print("\nStopped at once.", file=sys.stderr)
            self.end(Stopped(number).code)


signals: Final = StopSignals()


os.register_at_fork(after_in_child=signals.forget)


def in_loader_process(worker_id: int = 0) -> None:
    """Prepare a loader process: it ends with its parent, and signals that stop the command are for the parent.

    Terminals and schedulers send signals to all processes of a command. A loader process that ended on them would take
    the current step with it.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """End this process when its parent has ended or sends SIGTERM; SIGTERM of any other process is ignored."""
    while os.getppid() == parent:
        if not hasattr(signal, "sigtimedwait"):  # macOS
            time.sleep(1)
        elif (info := signal.sigtimedwait({signal.SIGTERM}, 1)) and info.si_pid == parent:
            break
    os._exit(0)
