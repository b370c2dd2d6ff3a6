"""Work queue for any number of processes that share a folder: each item is processed once.

A process acquires the lease on an item (see `files.leases`), processes it, and writes a file with the item's name to
the folder of the results. If the process dies, another one takes over its item. Leases only prevent duplicate work; the
result is correct because published files are never replaced (see `files.atomic`).

A folder with a hundred thousand results is expensive to list. Each process therefore remembers which items are free,
and checks an item only after it has acquired the lease. It lists the folder at the start, and later only if its memory
turns out to be out of date, at most for a small fraction of the time.
"""

import heapq
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Final

from spar_lightning.files.atomic import ACCESS_ERRORS
from spar_lightning.files.leases import Claims

LISTING: Final = 0.005  # largest fraction of the time that is spent on listing a folder
PAUSE: Final = (0.05, 2.0)  # seconds between checks of the items of other processes: at first, and at most


def share(
    names: Sequence[str],
    claims: Claims,
    results: Path,
    make: Callable[[str], Callable[[], None] | None],
    waiting: Callable[[str], None] = lambda holder: None,
) -> None:
    """Process all items, together with all other processes that call this function with the same folders.

    Returns when all items are finished, including those that other processes work on.

    Args:
        names: Names of the items, in the preferred order.
        claims: Leases on the items.
        results: Existing folder of the results: an item is finished if this folder contains a file with its name.
        make: Function that processes one item. It may return a function that publishes the result, which is called in
            a thread while the next item is processed.
        waiting: Function that is called repeatedly while other processes work on the remaining items, with the owner
            of one of their leases.

    Raises:
        OSError: A lease cannot be created, for example because the disk is full.
    """
    queue = _Queue(names, claims, results)
    pause = PAUSE[0]
    publishing = False
    # Closing `before` waits until the last item is published and releases its lease.
    with ThreadPoolExecutor(1) as writer, ExitStack() as before:
        while queue:
            pick = queue.take()
            if pick is None and publishing:
                before.close()
                publishing = False
                continue
            if pick is None:
                pick = queue.take_over()
            if pick is None:
                if holder := queue.holder():
                    waiting(holder)
                if queue:
                    time.sleep(pause)
                pause = min(2 * pause, PAUSE[1])
                continue
            with ExitStack() as item:
                item.enter_context(claims.held(pick))
                publish = make(pick)
                before.close()
                if publish is not None:
                    item.callback(writer.submit(publish).result)
                before.push(item.pop_all())
            pause, publishing = PAUSE[0], True
    clear_finished(claims, results)


def is_finished(results: Path, name: str) -> bool:
    """Return True if the folder of the results contains a file with this name."""
    # Network file systems remember for a minute that a file is missing, but check the folder when it is opened.
    descriptor = os.open(results, os.O_RDONLY)
    try:
        os.stat(name, dir_fd=descriptor)
        return True
    except FileNotFoundError:
        return False
    finally:
        os.close(descriptor)


def clear_finished(claims: Claims, results: Path) -> None:
    """Delete the leases of dead owners on finished items, which a kill between publishing and release leaves."""
    for name in claims.names():
        try:
            if is_finished(results, name):
                claims.clear(name)
        except OSError as error:  # for example, the folder is read-only
            if error.errno not in ACCESS_ERRORS:
                raise


class Throttle:
    """Limit on the fraction of the time that an expensive operation takes.

    Run the operation in a `with` block, which measures it, and only if `due()` returns True.
    """

    def __init__(self) -> None:
        self._began, self._next = 0.0, 0.0

    def due(self) -> bool:
        """Return True if the operation has not run yet, or so long ago that it may run again."""
        return time.monotonic() >= self._next

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self._next = now + (now - self._began) / LISTING


class FreeItems:
    """Indices of free items, handed out one after another in the order in which a worker should process them.

    A worker continues with the item after its last one. If that is not free, it begins in the middle of the longest
    run of free items. Workers thus spread over the list without communication, and each reads its part in order.
    Each step takes constant time, or logarithmic time in the number of runs.

    Args:
        indices: Indices of the free items, ascending.
        first: Index to begin with, if it is free.
    """

    def __init__(self, indices: Iterable[int], first: int = 0) -> None:
        self._runs: list[tuple[int, int]] = []  # heap of (-length, start)
        self._current = range(0)
        for _, group in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
            run = [i for _, i in group]
            start, stop = run[0], run[-1] + 1
            if start <= first < stop:
                self._push(range(start, first))
                self._current = range(first, stop)
            else:
                self._push(range(start, stop))

    def __bool__(self) -> bool:
        return bool(self._current or self._runs)

    def next(self) -> int:
        """Remove and return the index of the next item; there must be one."""
        if not self._current:
            minus_length, start = heapq.heappop(self._runs)
            middle = start + -minus_length // 2
            self._push(range(start, middle))
            self._current = range(middle, start - minus_length)
        item, self._current = self._current[0], self._current[1:]
        return item

    def leave(self) -> None:
        """Continue elsewhere: another worker has reached this part of the list."""
        self._push(self._current)
        self._current = range(0)

    def _push(self, run: range) -> None:
        if run:
            heapq.heappush(self._runs, (-len(run), run.start))


class _Queue:
    """Items that are not known to be finished; true if there are any.

    Args:
        names: Names of the items, in the preferred order.
        claims: Leases on the items.
        results: Folder of the results.
    """

    def __init__(self, names: Sequence[str], claims: Claims, results: Path) -> None:
        self.names, self.claims, self.results = names, claims, results
        self._missing: Sequence[int] = range(len(names))  # when the folder was listed
        self._picked: set[int] = set()  # by this worker, since then
        self._leased: list[int] = []  # by other processes, when this worker last tried
        self._listing = Throttle()
        self._list()

    def __bool__(self) -> bool:
        return bool(self._free or self._leased)

    def _list(self) -> None:
        """Find out which items are finished, leased and free."""
        with self._listing:
            finished, leased = set(os.listdir(self.results)), self.claims.names()
            self._missing = [i for i in self._missing if self.names[i] not in finished and i not in self._picked]
            self._leased = [i for i in self._missing if self.names[i] in leased]
            self._free = FreeItems(i for i in self._missing if self.names[i] not in leased)
            self._picked.clear()

    def take(self) -> str | None:
        """Acquire the lease on a free item and return its name; None if no item is known to be free."""
        while self._free:
            i = self._free.next()
            if self.claims.take(self.names[i]):
                if self._is_mine(i):
                    return self.names[i]
            else:
                self._leased.append(i)
            self._free.leave()
            if self._listing.due():
                self._list()
        return None

    def take_over(self) -> str | None:
        """Acquire the lease of a dead owner and return the name of the item; None if all owners are alive."""
        leased, self._leased = self._leased, []
        for place, i in enumerate(leased):
            if is_finished(self.results, self.names[i]):
                continue
            if not self.claims.take_over(self.names[i]):
                self._leased.append(i)
            elif self._is_mine(i):
                self._leased += leased[place + 1 :]
                return self.names[i]
        return None

    def holder(self) -> str:
        """Return the owner of the lease on an item that another process works on, or an empty string."""
        return self.claims.holder(self.names[self._leased[0]]) if self._leased else ""

    def _is_mine(self, i: int) -> bool:
        """Return True if an item with an acquired lease is to be processed; release the lease if it is finished."""
        if is_finished(self.results, self.names[i]):  # by another process, before we acquired the lease
            self.claims.release(self.names[i])
            return False
        self._picked.add(i)
        return True
