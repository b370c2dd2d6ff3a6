"""The images of a tar, after a strict reading of it.

A tar that is cut or damaged at a header, or that has a hole of zeros, ends quietly in most readers. Here
every header must parse, every member must be there in full, the two zero blocks of the end must
follow, and nothing may follow those.
"""

import gzip
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final, cast

import webdataset as wds

from spar_lightning.datasets.image_source import READ_ERRORS, ShardError, is_image, is_remote, is_streamed

BLOCK: Final = 512  # bytes; a tar consists of these
ENDING: Final = 2 * BLOCK + 10240  # bytes: the mark, and zeros up to the next multiple of tar's record
KEPT: Final = 1 << 16  # last bytes of a stream that are kept for the check of its end
GZIP_MAGIC: Final = b"\x1f\x8b"


def walk_tar(location: str) -> Iterator[tuple[str, str, int, bytes]]:
    """Key, name, offset and bytes of every image in a tar, after checking all of its headers and its end."""
    if not is_remote(location) and Path(location).stat().st_size == 0:
        raise ShardError(f"{location} is empty (0 bytes). Fetch it again, or leave it out of data.shards.")
    end = 0
    try:
        with _opened(location) as file:
            streamed = is_streamed(location)
            tail = _Tail(file)
            # Of a stream all bytes are read; in a file the annotations between the images are passed over.
            with tarfile.open(
                fileobj=cast(IO[bytes], tail if streamed else file), mode="r|" if streamed else "r:"
            ) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    if member.isreg() and is_image(member.name):
                        reader = tar.extractfile(member)
                        content = b"" if reader is None else reader.read()
                        if len(content) != member.size:
                            raise tarfile.ReadError(f"{member.name} is cut off")
                        yield PurePosixPath(member.name).stem, member.name, member.offset_data, content
            if not streamed:
                file.seek(end)
            rest = tail.at(end, ENDING + 1) if streamed else file.read(ENDING + 1)
            if len(rest) < 2 * BLOCK or rest.strip(b"\0"):
                raise tarfile.ReadError("neither a header nor the end-of-archive mark")
            if len(rest) > ENDING:  # a hole of zeros looks like an end
                raise tarfile.ReadError(f"more than {ENDING} bytes follow the last image")
            while streamed and tail.read(KEPT):  # a pipe that is closed early reports an error
                pass
    except READ_ERRORS as error:
        raise ShardError(
            f"{location} is damaged at byte {end}: {error}. Fetch it again, or leave it out of data.shards."
        ) from error


@contextmanager
def _opened(location: str) -> Iterator[Any]:
    """The uncompressed bytes of a tar."""
    with wds.gopen(location) if is_remote(location) else open(location, "rb") as file:
        if not is_streamed(location):
            yield file
            return
        start = file.read(2)
        joined = _Joined(start, file)
        with gzip.GzipFile(fileobj=cast(IO[bytes], joined)) if start == GZIP_MAGIC else joined as plain:
            yield plain


class _Joined:
    """Bytes that were read already, and the stream that they came from."""

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
    """A stream that counts its bytes and keeps the last of them, which tarfile reads ahead."""

    def __init__(self, file: Any) -> None:
        self.file, self.position, self.last = file, 0, b""

    def read(self, size: int) -> bytes:
        content: bytes = self.file.read(size)
        self.position += len(content)
        self.last = (self.last + content)[-KEPT:]
        return content

    def at(self, start: int, size: int) -> bytes:
        """Bytes from `start` on, read now where tarfile has not come so far."""
        while self.position < start + size and self.read(BLOCK):
            pass
        first = start - (self.position - len(self.last))
        return self.last[first : first + size] if first >= 0 else b""
