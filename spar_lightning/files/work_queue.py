"""Work shared by any number of processes over a folder: each item is done once, a dead worker's is taken over.

There are no collectives and no locks, which network file systems often lack. A claim is a file that
is created exclusively and touched while its owner lives. Claims only save work; what keeps the
result right is that publishing never replaces (see `durable`).
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
    """The claims on items of one kind of work.

    Args:
        folder: Where they lie; every worker sees the same folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> set[str]:
        """Items that somebody works on."""
        return set(os.listdir(self.folder))

    def take(self, name: str) -> bool:
        """Claim an item; False if another process has it."""
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
        """Claim an item whose owner has died; False if the owner lives or another process was faster."""
        path = self.folder / name
        try:
            holder, age = path.read_text(), self._now() - path.stat().st_mtime
            # A claim in our own name that we do not hold is of a process that had our pid, before a restart.
            if holder != owner() and not is_dead(holder) and age < STALE:
                return False
            path.unlink()
        except FileNotFoundError:
            return False
        return self.take(name)

    def holder(self, name: str) -> str:
        """Who works on an item: machine and process; empty if nobody does any more."""
        try:
            return (self.folder / name).read_text()
        except FileNotFoundError:
            return ""

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Keep a claim fresh inside the block and give it back at its end."""
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
        """The time by the clock of the file system, which need not be this machine's."""
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
    """Do all items, together with every other process that calls this with the same folder.

    Args:
        names: The items, in the order in which they are best done.
        claims: Who works on what.
        done: The items that are finished.
        make: Finishes one item, or returns what finishes it: called in a thread while the next item is made.
        waiting: Called now and then with the holder of an item that others still work on.
    """
    last = -1
    pause = 0.05
    publishing = False
    # Closing `before` waits until the last item is published and gives its claim back.
    with ThreadPoolExecutor(1) as writer, ExitStack() as before:
        while missing := [i for i, finished in enumerate(map(done().__contains__, names)) if not finished]:
            taken = claims.names()
            free = [i for i in missing if names[i] not in taken]
            if free:
                pick = next_item(free, last)
                mine = claims.take(names[pick])
            elif publishing:  # our own claim would look like one of a dead process
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
                # Finished between the look and the claim?
                publish = make(names[pick]) if names[pick] not in done() else None
                before.close()
                if publish is not None:
                    item.callback(writer.submit(publish).result)
                before.push(item.pop_all())
            last, pause, publishing = pick, 0.05, True


def next_item(free: Sequence[int], last: int) -> int:
    """The item to claim: the one after the last, or the middle of the longest run of free ones.

    Workers spread over the list without knowing of each other, and each reads its part in order.

    Args:
        free: Indices that nobody has claimed, ascending and not empty.
        last: The index that this worker did before, or -1.
    """
    if last + 1 in free:
        return last + 1
    runs = [[i for _, i in run] for _, run in groupby(enumerate(free), key=lambda pair: pair[1] - pair[0])]
    longest = max(runs, key=len)
    return longest[len(longest) // 2]
