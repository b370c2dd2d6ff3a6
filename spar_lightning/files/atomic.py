"""Files that are there whole or not at all, whatever dies in between.

Content is written under a private name in a folder of the same file system, synced, and only then
linked to its final name. A link never replaces: of two processes with the same result one publishes
it, and the other finds it there.
"""

import errno
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

# What keeps a whole file from being read or written: no reason to call it damaged.
ACCESS_ERRORS: Final = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "ENOENT", "EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "ETIMEDOUT")
}
NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
OLD: Final = 24 * 3600.0  # seconds after which an unfinished file of another machine is nobody's


def _machine() -> str:
    """Name of the machine since its last start and of the container: where it is equal, pids can be compared."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:  # no Linux
        boot = space = "0"
    return f"{socket.gethostname()}-{boot}-{space}".replace(".", "_")


MACHINE: Final = _machine()


def owner() -> str:
    """Name of this process among all machines that share a folder."""
    return f"{MACHINE}.{os.getpid()}"


def is_dead(name: str) -> bool:
    """Whether the process of this name is known to have ended; False where that cannot be seen from here."""
    machine, _, pid = name.partition(".")
    if machine != MACHINE or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, of another user
        return False
    return False


def private_path(folder: Path, path: Path) -> Path:
    """A new name in `folder` for the unfinished content of `path`; `sweep` knows whose it is."""
    return folder / f"{owner()}.{uuid.uuid4().hex[:8]}.{path.name}"


def make_folder(folder: Path) -> None:
    """Make a working folder, which a copy of a cache may lack; one for reading only goes without."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES) or not folder.parent.exists():
            raise


def sweep(folder: Path) -> None:
    """Delete unfinished files of processes that have ended."""
    for path in folder.iterdir() if folder.exists() else []:
        machine, pid, *_ = (*path.name.split("."), "")
        try:
            if is_dead(f"{machine}.{pid}") or time.time() - path.stat().st_mtime > OLD:
                path.unlink()
        except OSError as error:  # another process sweeps too or has published it; or the folder is for reading only
            if error.errno not in ACCESS_ERRORS:
                raise


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a new file and bring it to the disk.

    Raises:
        OSError: The disk is full, among others; nothing is left behind.
    """
    file = open(path, "xb")  # noqa: SIM115 - closed below; a name that exists is not ours to delete
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def link(unfinished: Path, path: Path) -> bool:
    """Give a synced file its final name; False if that name was taken first. The unfinished name goes either way.

    Where the file system has no hard links, two processes that publish at the same moment may replace each other.
    """
    try:
        os.link(unfinished, path)
        published = True
    except FileExistsError:
        # Network file systems repeat a request whose answer was lost: it may be our own file that exists.
        published = path.samefile(unfinished)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        published = not path.exists()
        if published:
            os.replace(unfinished, path)
    unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)
    return published


def publish(path: Path, content: bytes | memoryview, private: Path) -> bool:
    """Write a file at once, unless its name is taken; whether this call made it."""
    unfinished = private_path(private, path)
    write(unfinished, content)
    return link(unfinished, path)


def replace(path: Path, content: bytes | memoryview, private: Path) -> None:
    """Write a file at once, in place of one of the same name; `private` is created if necessary."""
    private.mkdir(parents=True, exist_ok=True)
    unfinished = private_path(private, path)
    write(unfinished, content)
    os.replace(unfinished, path)
    sync_folder(path.parent)


def replace_json(path: Path, content: Any, private: Path) -> None:
    """Write plain data as indented JSON, like `replace`."""
    replace(path, f"{json.dumps(content, indent=2)}\n".encode(), private)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an unfinished folder next to `path`; it gets that name when the block ends without an error.

    Raises:
        OSError: `path` exists by then; the unfinished folder is removed, as after any error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{path.name}.unfinished-", dir=path.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
