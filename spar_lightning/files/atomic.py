"""Atomic file writes: a file either exists with its full content or does not exist, even if the process dies.

Content is written under a temporary name in a private folder on the same file system, synced, and then linked to its
final name. A link never replaces an existing file: if two processes have the same result, the first one publishes it
and the second one finds the name taken.
"""

import errno
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

# Errors that prevent access to an intact file; they do not mean that it is damaged.
ACCESS_ERRORS: Final = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "ENOENT", "EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "ETIMEDOUT")
}
NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# Names that `private_path` gives: machine, boot, PID namespace, process ID, and the rest.
PRIVATE: Final = re.compile(r"[^.]*-[0-9a-f]+-\d+\.\d+\..")
OLD: Final = 24 * 3600.0  # seconds after which unfinished files of other machines are deleted
ATTEMPTS: Final = 5  # attempts to write a file whose unfinished content is deleted by someone else


def _machine() -> str:
    """Return a name of machine, boot and PID namespace; processes with the same name can compare process IDs."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:  # not Linux
        boot = space = "0"
    return f"{socket.gethostname()}-{boot}-{space}".replace(".", "_")


MACHINE: Final = _machine()


def owner() -> str:
    """Return the name of this process, unique among all machines that share a folder."""
    return f"{MACHINE}.{os.getpid()}"


def is_dead(name: str) -> bool:
    """Return True if the process with this name has ended; False if it runs or if this machine cannot tell."""
    machine, _, pid = name.partition(".")
    if machine != MACHINE or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, but owned by another user
        return False
    return False


def private_path(folder: Path, path: Path) -> Path:
    """Return a new path in `folder` for the unfinished content of `path`, with the process name for `sweep`."""
    # The end of the name is enough: with the whole one, the temporary name could be too long for the file system.
    return folder / f"{owner()}.{uuid.uuid4().hex[:8]}.{path.name[-40:]}"


def make_folder(folder: Path) -> None:
    """Create a working folder if it is missing; do nothing on a read-only file system or without write permission."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        if folder.exists():  # a file
            raise
        make_folder(folder)  # another process has deleted it since mkdir found it
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES) or not folder.parent.exists():
            raise


def sweep(folder: Path) -> None:
    """Delete unfinished files and folders of processes that have ended; leave files with other names alone."""
    for path in folder.iterdir() if folder.exists() else []:
        if not PRIVATE.match(path.name):
            continue
        machine, pid, *_ = path.name.split(".")
        try:
            if is_dead(f"{machine}.{pid}") or time.time() - path.stat().st_mtime > OLD:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:  # another process has deleted or published the file, or the folder is read-only
            if error.errno not in ACCESS_ERRORS:
                raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to a system error that names no file, such as a full disk while an open file is written.

    Raises:
        OSError: The error, with the path.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a new file and sync it to disk.

    Raises:
        OSError: The file exists or cannot be written (for example, disk full). A partial file is deleted.
    """
    file = open(path, "xb")  # noqa: SIM115 - closed below; outside of try, so that an existing file is not deleted
    try:
        with naming(path), file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def link(unfinished: Path, path: Path) -> bool:
    """Link a synced file to its final path and delete its temporary name; return False if `path` already exists.

    On file systems without hard links, two processes that publish at the same moment may replace each other's file.
    """
    try:
        os.link(unfinished, path)
        published = True
    except FileExistsError:
        # Network file systems repeat a request if the reply was lost: the existing file may be our own.
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


def publish(
    path: Path, content: bytes | memoryview, private: Path, check: Callable[[Path], None] = lambda unfinished: None
) -> bool:
    """Write a file atomically and return True; return False if `path` already exists.

    Args:
        path: Final path, in an existing folder.
        content: Content of the file.
        private: Folder for the unfinished file, on the same file system. It is created if necessary, also if it is
            deleted in the meantime.
        check: Function that is called with the path of the unfinished file and raises an error if it is damaged.

    Raises:
        OSError: The file cannot be written (for example, disk full).
    """
    for _ in range(ATTEMPTS):
        make_folder(private)
        unfinished = private_path(private, path)
        try:
            write(unfinished, content)
            check(unfinished)
            return link(unfinished, path)
        except Exception as error:
            # Try again only if someone else has deleted the unfinished file. Errors of `check` have no number.
            if unfinished.exists() or path.exists() or getattr(error, "errno", errno.ENOENT) != errno.ENOENT:
                raise
            lost = error
    raise lost


def replace(path: Path, content: bytes | memoryview, private: Path) -> None:
    """Write a file atomically, replacing an existing one; the folder `private` is created if necessary."""
    private.mkdir(parents=True, exist_ok=True)
    unfinished = private_path(private, path)
    write(unfinished, content)
    os.replace(unfinished, path)
    sync_folder(path.parent)


def replace_json(path: Path, content: Any, private: Path) -> None:
    """Write JSON-serializable data as indented JSON; otherwise like `replace`."""
    replace(path, f"{json.dumps(content, indent=2)}\n".encode(), private)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path` and rename it to `path` if the block ends without an error.

    Raises:
        OSError: `path` exists when the block ends. The temporary folder is deleted, as after any error.
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
    """Sync the directory entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
