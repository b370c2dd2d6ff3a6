"""Leases on a shared file system: at most one process holds the lease on a name.

Leases need neither collectives nor file locks, which network file systems often lack. The lease on a name is a folder
NAME with one empty file, whose name consists of the owner and a random number. The folder is prepared under a private
name and renamed to NAME; the file system rejects this if NAME exists and is not empty. The owner touches the file while
it is alive, and deletes it to release the lease. If the owner dies, another process deletes the file.

No file name is used twice. Deleting the file of a dead owner therefore cannot hit the lease of its successor, however
late the deletion comes, and of all processes that take over a lease only one can rename its folder to NAME.
"""

import errno
import os
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from spar_lightning.files.atomic import ACCESS_ERRORS, is_dead, make_folder, owner, private_path

HEARTBEAT: Final = 10.0  # seconds
STALE: Final = 180.0  # seconds without a heartbeat; attributes on network file systems lag by up to 60
ATTEMPTS: Final = 5  # attempts to create a lease while the working folders are being deleted
# The lease has just been released, or a folder has just been deleted: try again.
CHANGED: Final = {errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
NO_FOLDER_RENAME: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}

_held_here: set[str] = set()  # file names of the leases of this process


class Claims:
    """Leases on names, such as the items of a work queue.

    Args:
        folder: Folder of the leases, shared by all processes. Unfinished leases are created in a folder tmp next to
            it. Both folders are created if necessary, also if they are deleted while leases are held.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private = folder.parent / "tmp"
        self._mine: dict[str, str] = {}  # name -> file name of the lease
        self._clock = (-HEARTBEAT, 0.0)

    def names(self) -> set[str]:
        """Return all names with a lease, including those of dead owners."""
        try:
            return set(os.listdir(self.folder))
        except FileNotFoundError:
            return set()

    def take(self, name: str) -> bool:
        """Acquire the lease on a name; return False if there is one already, even if its owner is dead.

        Raises:
            OSError: The lease cannot be created, for example because the disk is full or read-only.
        """
        lease = f"{owner()}.{uuid.uuid4().hex[:16]}"
        _held_here.add(lease)  # before it exists, so that other threads do not consider it dead
        try:
            if self._create(name, lease):
                self._mine[name] = lease
                return True
            return False
        finally:
            if self._mine.get(name) != lease:
                _held_here.discard(lease)

    def take_over(self, name: str) -> bool:
        """Acquire the lease on a name if nobody holds it or its owner is dead; return False otherwise.

        If several processes call this method at the same moment, only one of them acquires the lease.
        """
        return self.clear(name) and self.take(name)

    def clear(self, name: str) -> bool:
        """Delete the lease on a name if its owner is dead; return False if the owner is alive."""
        for path, holder in self._leases(name):
            if not self._is_dead(path, holder):
                return False
            try:
                path.unlink(missing_ok=True)
            except OSError:
                if path.is_dir():  # another process has replaced a lease of an older version
                    return False
                raise
        _remove_empty(self.folder / name)
        return True

    def holder(self, name: str) -> str:
        """Return the owner of a lease (machine and process ID), or an empty string if the name is not leased."""
        return next((holder for _, holder in self._leases(name)), "")

    def release(self, name: str) -> None:
        """Release a lease of this object; do nothing if another process has taken it over."""
        lease = self._mine.pop(name)
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                (self.folder / name / lease).unlink()
        finally:
            _held_here.discard(lease)
        _remove_empty(self.folder / name)

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Renew a lease of this object while the block runs and release it at the end."""
        path, done = self.folder / name / self._mine[name], threading.Event()

        def touch() -> None:
            while not done.wait(HEARTBEAT):
                try:
                    os.utime(path)
                except (FileNotFoundError, NotADirectoryError):  # taken over while this process was suspended
                    return
                except OSError as error:  # the file system may be out of reach for a moment
                    if error.errno not in ACCESS_ERRORS:
                        raise

        heart = threading.Thread(target=touch, daemon=True)
        heart.start()
        try:
            yield
        finally:
            done.set()
            heart.join()
            self.release(name)

    def _leases(self, name: str) -> list[tuple[Path, str]]:
        """Return path and owner of the leases on a name: none, or one."""
        path = self.folder / name
        try:
            return [(path / lease, lease.rpartition(".")[0]) for lease in os.listdir(path)]
        except NotADirectoryError:  # written by version 0.1: a file that contains the owner
            with suppress(FileNotFoundError, IsADirectoryError):
                return [(path, path.read_text())]
            return self._leases(name)
        except FileNotFoundError:
            return []

    def _create(self, name: str, lease: str) -> bool:
        """Create a lease; return False if there is one already or another process was faster."""
        path = self.folder / name
        for attempt in range(ATTEMPTS):
            if self._leases(name):
                return False
            unfinished = private_path(self.private, path)
            try:
                unfinished.mkdir()
                # Whoever may write to the folder of the leases may also delete the lease of a dead owner.
                unfinished.chmod(stat.S_IMODE(self.folder.stat().st_mode))
                (unfinished / lease).touch()
                os.rename(unfinished, path)
                return True
            except OSError as error:
                leases = [other.name for other, _ in self._leases(name)]
                if lease in leases:  # network file systems repeat a request if the reply was lost
                    return True
                shutil.rmtree(unfinished, ignore_errors=True)
                if leases:
                    return False
                if error.errno in NO_FOLDER_RENAME:
                    return _create_in_place(path, lease)
                if error.errno not in CHANGED or attempt == ATTEMPTS - 1:
                    raise
                make_folder(self.private)
                make_folder(self.folder)
                _remove_empty(path)  # not all file systems replace empty folders
        raise AssertionError

    def _is_dead(self, path: Path, holder: str) -> bool:
        """Return True if the owner of a lease has ended or has not renewed the lease for `STALE` seconds."""
        if holder == owner() and path.name in _held_here:
            return False
        # An empty file was left by version 0.1 when it was killed or the disk was full. A lease in our own name that
        # we do not hold is from an earlier process with the same process ID.
        if holder in ("", owner()) or is_dead(holder):
            return True
        now = self._now()
        try:
            return now - path.stat().st_mtime >= STALE
        except (FileNotFoundError, NotADirectoryError):  # released
            return True

    def _now(self) -> float:
        """Return the time of the file system's clock, which may differ from the clock of this machine."""
        measured, offset = self._clock
        if time.monotonic() - measured >= HEARTBEAT:
            for attempt in range(ATTEMPTS):
                probe = private_path(self.private, Path("clock"))
                try:
                    probe.touch()
                    measured = time.monotonic()
                    offset = probe.stat().st_mtime - measured
                    break
                except FileNotFoundError:
                    if attempt == ATTEMPTS - 1:
                        raise
                    make_folder(self.private)
            probe.unlink(missing_ok=True)
            self._clock = measured, offset
        return time.monotonic() + offset


def _remove_empty(folder: Path) -> None:
    """Remove a folder if it exists and is empty."""
    with suppress(OSError):
        folder.rmdir()


def _create_in_place(path: Path, lease: str) -> bool:
    """Create a lease on a file system that cannot rename folders; return False if another process does so too.

    Each process first creates its file and then looks for others, so that at most one of them does not withdraw.
    """
    path.mkdir(exist_ok=True)
    (path / lease).touch()
    if os.listdir(path) == [lease]:
        return True
    (path / lease).unlink(missing_ok=True)
    return False
