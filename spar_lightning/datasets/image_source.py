"""Reading of one training image from a tar file, a folder, or a stream that can only be read forward.

Local tar files and folders are read by offset and size. Gzipped and remote shards are read as streams. Each process
keeps the last few streams open and reads them forward, so reading all images in order takes one pass.
In all cases the bytes are compared with the hash in the shard index.
"""

import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.datasets.shard_stream import ShardStream, is_streamed
from spar_lightning.files.hashing import hash_bytes, hash_stream

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
OPEN_STREAMS: Final = 2  # per process
READ_ERRORS: Final = (OSError, EOFError, tarfile.TarError, zlib.error)  # raised for damaged or truncated shards


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Source:
    """Location and hash of one image.

    Args:
        key: File name without suffix: in a tar without its folders, in an image folder with its subfolders.
        location: Tar file, URL, `pipe:` command or image folder.
        name: Member of the tar, or path relative to the folder.
        offset: Offset of the first byte in the uncompressed tar, for a link that of its target; 0 for a file in a
            folder.
        size: Size in bytes.
        digest: BLAKE2b hash of the bytes (16 bytes, hexadecimal).
    """

    key: str
    location: str
    name: str
    offset: int
    size: int
    digest: str

    def read(self) -> bytes:
        """Return the bytes of the image file after checking their hash.

        Raises:
            ShardError: If the shard cannot be read or has changed since it was indexed.
        """
        try:
            content = _stream(self) if is_streamed(self.location) else self._read_at()
        except READ_ERRORS as error:
            raise ShardError(f"{self.location}: {self.key} cannot be read ({error}). Restore the shard.") from error
        self._compare(hash_bytes(content))
        return content

    def check(self) -> None:
        """Check the hash of the image file; a file in a folder is not read into memory as a whole.

        Raises:
            ShardError: As for `read`.
        """
        if self.file is None:
            self.read()
            return
        try:
            with self.file.open("rb") as file:
                self._compare(hash_stream(file))
        except OSError as error:
            raise ShardError(f"{self.location}: {self.key} cannot be read ({error}). Restore the file.") from error

    @property
    def file(self) -> Path | None:
        """Path of an image in a folder; None for an image in a shard."""
        folder = not is_streamed(self.location) and os.path.isdir(self.location)
        return Path(self.location, self.name) if folder else None

    def _compare(self, digest: bytes) -> None:
        if digest.hex() != self.digest:
            raise ShardError(f"{self.location}: the bytes of {self.key} have changed since it was indexed. {RESTORE}")

    def _read_at(self) -> bytes:
        with open(self.file or self.location, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


RESTORE: Final = (
    "Restore the original shard, or delete the folder `scans` in the cache or run folder to index it again."
)


def digest_array(digests: Iterable[str]) -> NDArray[np.uint64]:
    """Convert hexadecimal digests to an array (N, 2) of uint64."""
    return np.frombuffer(bytes.fromhex("".join(digests)), "<u8").reshape(-1, 2)


def key_array(keys: Iterable[str]) -> NDArray[np.bytes_]:
    """Convert keys to an array (N,) of fixed-width bytes."""
    return np.array([key.encode(errors="surrogateescape") for key in keys] or np.empty(0, "S1"), "S")


class _Cursor:
    """Open stream of a shard, positioned after the last image that was read."""

    def __init__(self, location: str) -> None:
        self.stream = ShardStream(location)
        self.offset, self.content = -1, b""

    def take(self, source: Source) -> bytes:
        """Read forward to an image and return its bytes; the last image can be read again."""
        if source.offset != self.offset:
            self.stream.seek(source.offset)
            self.content = self.stream.read(source.size)
            if len(self.content) < source.size:
                raise EOFError(f"the stream ended before {source.name}")
            self.offset = source.offset
        return self.content


_cursors: "OrderedDict[tuple[int, str], _Cursor]" = OrderedDict()


def _stream(source: Source) -> bytes:
    place = (os.getpid(), source.location)  # a stream inherited by fork belongs to the parent
    cursor = _cursors.pop(place, None)
    if cursor is None or cursor.offset > source.offset:
        if cursor is not None:
            cursor.stream.close()
        cursor = _Cursor(source.location)
    try:
        content = cursor.take(source)
    except BaseException:
        cursor.stream.close()
        raise
    _cursors[place] = cursor
    while len(_cursors) > OPEN_STREAMS:
        _cursors.popitem(last=False)[1].stream.close()
    return content
