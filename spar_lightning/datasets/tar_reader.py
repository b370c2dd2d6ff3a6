"""Strict reader for the images of a tar file.

Most readers stop silently at a truncated or damaged header, or at a block of zeros. Here every header must be valid,
every member must be complete, and the two zero blocks of the end-of-archive mark must follow, with nothing but zero
padding after them.
"""

import gzip
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final, cast

import webdataset as wds

from spar_lightning.datasets.image_source import READ_ERRORS, ShardError, is_image, is_remote, is_streamed

BLOCK: Final = 512  # bytes per block of a tar
ENDING: Final = 2 * BLOCK + 10240  # bytes: end-of-archive mark, and zeros up to the next multiple of tar's record size
KEPT: Final = 1 << 16  # last bytes of a stream that are kept to check its end
GZIP_MAGIC: Final = b"\x1f\x8b"


def walk_tar(location: str) -> Iterator[tuple[str, str, int, bytes]]:
    """Yield key, name, offset and bytes of every image in a tar, checking all headers and the end.

    Raises:
        ShardError: If the tar is empty or damaged.
    """
    if not is_remote(location) and Path(location).stat().st_size == 0:
        raise ShardError(f"{location} is empty (0 bytes). Download it again, or remove it from data.shards.")
    end = 0
    try:
        with _opened(location) as file:
            streamed = is_streamed(location)
            tail = _Tail(file)
            # A stream is read completely; in a file, the annotations between the images are skipped.
            with tarfile.open(
                fileobj=cast(IO[bytes], tail if streamed else file), mode="r|" if streamed else "r:"
            ) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all members in memory
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    if member.isreg() and is_image(member.name):
                        reader = tar.extractfile(member)
                        content = b"" if reader is None else reader.read()
                        if len(content) != member.size:
                            raise tarfile.ReadError(f"{member.name} is truncated")
                        yield PurePosixPath(member.name).stem, member.name, member.offset_data, content
            if not streamed:
                file.seek(end)
            rest = tail.at(end, ENDING + 1) if streamed else file.read(ENDING + 1)
            if len(rest) < 2 * BLOCK or rest.strip(b"\0"):
                raise tarfile.ReadError("expected a header or the end-of-archive mark")
            if len(rest) > ENDING:  # a block of zeros in the middle looks like the end
                raise tarfile.ReadError(f"more than {ENDING} bytes follow the last image")
            while streamed and tail.read(KEPT):  # a pipe that is closed early raises an error
                pass
    except READ_ERRORS as error:
        raise ShardError(
            f"{location} is damaged at byte {end}: {error}. Download it again, or remove it from data.shards."
        ) from error


@contextmanager
def _opened(location: str) -> Iterator[Any]:
    """Open a tar as a file object of its uncompressed bytes."""
    with wds.gopen(location) if is_remote(location) else open(location, "rb") as file:
        if not is_streamed(location):
            yield file
            return
        start = file.read(2)
        joined = _Joined(start, file)
        with gzip.GzipFile(fileobj=cast(IO[bytes], joined)) if start == GZIP_MAGIC else joined as plain:
            yield plain


class _Joined:
    """Stream with its first bytes, which were already read, put back."""

    def __init__(self, start: bytes, file: Any) -> None:
        self.start, self.file = start, file

    def read(self, size: int) -> bytes:
        start, self.start = self.start[:size], self.start[size:]
        return start + bytes(self.file.read(size - len(start))) if len(start) < size else start

    def __enter__(self) -> "_Joined":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Tail:
    """Stream that counts its bytes and keeps the last of them, because tarfile reads ahead."""

    def __init__(self, file: Any) -> None:
        self.file, self.position, self.last = file, 0, b""

    def read(self, size: int) -> bytes:
        content: bytes = self.file.read(size)
        self.position += len(content)
        self.last = (self.last + content)[-KEPT:]
        return content

    def at(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start`, reading on if tarfile has not reached them."""
        while self.position < start + size and self.read(BLOCK):
            pass
        first = start - (self.position - len(self.last))
        return self.last[first : first + size] if first >= 0 else b""
