"""Uncompressed bytes of a tar file: local or remote, plain or gzipped.

All of them can be read forward. Only local plain tar files support random access.
"""

import gzip
import os
import stat
import tarfile
from contextlib import ExitStack
from functools import lru_cache
from typing import IO, Any, Final, cast

from spar_lightning.datasets.container import BLOCK, GZIP, check_tar
from spar_lightning.datasets.remote_shard import is_remote, open_remote

CHUNK: Final = 1 << 20  # bytes that are skipped at once
LARGEST: Final = 1 << 30  # bytes of an image file


def is_streamed(location: str) -> bool:
    """Return whether a location can only be read from the front: a remote, piped or gzipped shard.

    Raises:
        OSError: A local file cannot be read.
    """
    if is_remote(location):
        return True
    status = os.stat(location)
    return not stat.S_ISDIR(status.st_mode) and _is_gzipped(location, status.st_size, status.st_mtime_ns)


@lru_cache(4096)
def _is_gzipped(path: str, size: int, time: int) -> bool:
    with open(path, "rb") as file:
        return file.read(len(GZIP)) == GZIP


class ShardStream:
    """File object of the uncompressed bytes of a tar, with the methods that tarfile calls.

    Args:
        location: Local tar file, URL or `pipe:` command.

    Attributes:
        position: Number of bytes before the next one.
        last: Bytes that the last call of `read` returned.

    Raises:
        ShardError: The file is empty or not a tar file, or the remote shard cannot be read.
        OSError: The local file cannot be read.
    """

    def __init__(self, location: str) -> None:
        self.position, self.last = 0, b""
        with ExitStack() as opened:
            remote = is_remote(location)
            file = opened.enter_context(open_remote(location) if remote else open(location, "rb"))  # noqa: SIM115
            self._local = None if remote else file
            start = file.read(BLOCK)
            self._file = _Joined(start, file)
            if start.startswith(GZIP):
                self._local = None
                file = opened.enter_context(gzip.GzipFile(fileobj=cast(IO[bytes], self._file)))
                start = file.read(BLOCK)
                self._file = _Joined(start, file)
            check_tar(start, location)
            self._opened = opened.pop_all()

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes; fewer at the end.

        Raises:
            tarfile.ReadError: A damaged header claims an impossible size, which could exhaust memory.
        """
        if not 0 <= size <= LARGEST:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        self.last = self._file.read(size)
        self.position += len(self.last)
        return self.last

    def tell(self) -> int:
        """Return the position."""
        return self.position

    def seek(self, position: int) -> None:
        """Skip the bytes before a position.

        Raises:
            tarfile.ReadError: The position was already passed: a damaged header claims a negative size.
        """
        if position < self.position:
            raise tarfile.ReadError(f"a header points back to byte {position}")
        if self._local is not None:
            self._local.seek(position)
            self._file.start, self.position = b"", position
        while self.position < position and self.read(min(CHUNK, position - self.position)):
            pass

    def close(self) -> None:
        """Close the stream and end its child process."""
        self._opened.close()

    def __enter__(self) -> "ShardStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Joined:
    """Stream with its first bytes, which were already read, put back."""

    def __init__(self, start: bytes, file: Any) -> None:
        self.start, self.file = start, file

    def read(self, size: int) -> bytes:
        start, self.start = self.start[:size], self.start[size:]
        return start + bytes(self.file.read(size - len(start))) if len(start) < size else start
