"""Work queue for any number of processes that share a folder: each item is processed once.

The queue needs neither collectives nor file locks, which network file systems often lack. A lease on an item is a file
that is created exclusively and touched while its owner is alive. If the owner dies, another process takes over the
item. Leases only prevent duplicate work; the result is correct because published files are never replaced (see
`files.atomic`).
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Final

from spar_lightning.files.atomic import is_dead, owner

HEARTBEAT: Final = 10.0  # seconds
STALE: Final = 180.0  # seconds without a heartbeat; attributes on network file systems lag by up to 60


class Claims:
    """Leases on the items of a work queue.

    Args:
        folder: Folder of the lease files, shared by all workers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> set[str]:
        """Return the names of all leased items."""
        return set(os.listdir(self.folder))

    def take(self, name: str) -> bool:
        """Acquire the lease on an item; return False if it is already leased."""
        try:
            descriptor = os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, owner().encode())
        finally:
            os.close(descriptor)
        return True

    def take_over(self, name: str) -> bool:
        """Acquire the lease of a dead owner; return False if the owner is alive or another process was faster."""
        path = self.folder / name
        try:
            holder, age = path.read_text(), self._now() - path.stat().st_mtime
            # A lease in our own name that we do not hold is from an earlier process with the same process ID.
            if holder != owner() and not is_dead(holder) and age < STALE:
                return False
            path.unlink()
        except FileNotFoundError:
            return False
        return self.take(name)

    def holder(self, name: str) -> str:
        """Return the owner of a lease (machine and process ID); empty if the item is not leased."""
        try:
            return (self.folder / name).read_text()
        except FileNotFoundError:
            return ""

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Renew a lease while the block runs and release it at the end."""
        path, done = self.folder / name, threading.Event()

        def touch() -> None:
            while not done.wait(HEARTBEAT):
                try:
                    os.utime(path)
                except FileNotFoundError:  # taken over while this process was suspended
                    return

        heart = threading.Thread(target=touch, daemon=True)
        heart.start()
        try:
            yield
        finally:
            done.set()
            heart.join()
            if self.holder(name) == owner():
                path.unlink(missing_ok=True)

    def _now(self) -> float:
        """Return the time of the file system's clock, which may differ from the clock of this machine."""
        probe = self.folder.parent / "tmp" / f"{owner()}.clock"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now


def share(
    names: Sequence[str],
    claims: Claims,
    done: Callable[[], set[str]],
    make: Callable[[str], Callable[[], None] | None],
    waiting: Callable[[str], None] = lambda holder: None,
) -> None:
    """Process all items, together with all other processes that call this function with the same folder.

    Args:
        names: Names of the items, in the preferred order.
        claims: Leases on the items.
        done: Function that returns the names of the finished items.
        make: Function that processes one item. It may return a function that publishes the result, which is called in
            a thread while the next item is processed.
        waiting: Function that is called repeatedly while other processes work on the remaining items, with the owner
            of one of their leases.
    """
    last = -1
    pause = 0.05
    publishing = False
    # Closing `before` waits until the last item is published and releases its lease.
    with ThreadPoolExecutor(1) as writer, ExitStack() as before:
        while missing := [i for i, finished in enumerate(map(done().__contains__, names)) if not finished]:
            taken = claims.names()
            free = [i for i in missing if names[i] not in taken]
            if free:
                pick = next_item(free, last)
                mine = claims.take(names[pick])
            elif publishing:  # our own lease would look like the lease of a dead process
                before.close()
                publishing = False
                continue
            else:
                pick, mine = next(((i, True) for i in missing if claims.take_over(names[i])), (-1, False))
            if not mine:
                if not free:
                    waiting(claims.holder(names[missing[0]]))
                    time.sleep(pause)
                    pause = min(2 * pause, 2.0)
                continue
            with ExitStack() as item:
                item.enter_context(claims.held(names[pick]))
                # Another process may have finished the item before we acquired the lease.
                publish = make(names[pick]) if names[pick] not in done() else None
                before.close()
                if publish is not None:
                    item.callback(writer.submit(publish).result)
                before.push(item.pop_all())
            last, pause, publishing = pick, 0.05, True


def next_item(free: Sequence[int], last: int) -> int:
    """Return the index of the next item: the one after the last, or the middle of the longest run of free items.

    Workers thus spread over the list without communication, and each reads its part in order.

    Args:
        free: Indices of the items without a lease, ascending and not empty.
        last: Index of the item that this worker processed before, or -1.
    """
    if last + 1 in free:
        return last + 1
    runs = [[i for _, i in run] for _, run in groupby(enumerate(free), key=lambda pair: pair[1] - pair[0])]
    longest = max(runs, key=len)
    return longest[len(longest) // 2]
