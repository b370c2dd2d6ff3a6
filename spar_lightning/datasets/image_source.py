"""One training image where it lies: in a tar, in a folder, or in a stream that can only be read forward.

Local tars and files are read by offset and size. Gzipped and remote shards come through webdataset's
streams; a process keeps the last few open and moves forward in them, so reading in order costs one pass.
Whatever the way, the bytes are compared with the hash that the scan took.
"""

import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from spar_lightning.errors import UserError
from spar_lightning.files.hashing import hash_bytes

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
OPEN_STREAMS: Final = 2  # per process
READ_ERRORS: Final = (OSError, EOFError, tarfile.TarError, zlib.error)  # what a damaged or broken-off shard raises


class ShardError(UserError):
    """A shard or folder of images is missing, empty, damaged or changed."""


def is_image(name: str) -> bool:
    """Whether a file name is that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_remote(location: str) -> bool:
    """Whether a location is a URL or a pipe: not a path of this machine."""
    return location.startswith("pipe:") or "://" in location


def is_streamed(location: str) -> bool:
    """Whether a location can be read from the front only: remote, piped, or compressed."""
    return is_remote(location) or location.endswith((".gz", ".tgz"))


@dataclass(frozen=True)
class Source:
    """One image.

    Args:
        key: File name without suffix; inside a tar without folder, too.
        location: Tar, URL, pipe, or folder of images.
        name: Member of the tar, or path below the folder.
        offset: First byte in the (uncompressed) tar; 0 for a file.
        size: Bytes.
        digest: blake2b of the bytes, 16 bytes as hex.
    """

    key: str
    location: str
    name: str
    offset: int
    size: int
    digest: str

    def read(self) -> bytes:
        """The image's bytes, checked against the hash.

        Raises:
            ShardError: The shard cannot be read, or changed since it was scanned.
        """
        try:
            content = _stream(self) if is_streamed(self.location) else self._read_at()
        except READ_ERRORS as error:
            raise ShardError(f"{self.location}: {self.key} cannot be read ({error}). Restore the shard.") from error
        if hash_bytes(content).hex() != self.digest:
            raise ShardError(f"{self.location}: the bytes of {self.key} changed after the scan. {RESTORE}")
        return content

    def _read_at(self) -> bytes:
        path = os.path.join(self.location, self.name) if os.path.isdir(self.location) else self.location
        with open(path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


RESTORE: Final = "Restore it as it was, or delete the folder `scans` of the cache or run to scan it anew."


def digest_array(digests: Iterable[str]) -> NDArray[np.uint64]:
    """Digests in hex as (n, 2) numbers of 64 bits."""
    return np.frombuffer(bytes.fromhex("".join(digests)), "<u8").reshape(-1, 2)


def key_array(keys: Iterable[str]) -> NDArray[np.bytes_]:
    """Keys as bytes of a fixed width."""
    return np.array([key.encode() for key in keys] or np.empty(0, "S1"), "S")


class _Cursor:
    """A stream at the place behind the last image that was taken from it."""

    def __init__(self, location: str) -> None:
        self.members: Iterator[dict[str, object]] = wds.tariterators.tar_file_expander(
            wds.tariterators.url_opener([{"url": location}], handler=wds.reraise_exception),
            select_files=is_image,
            handler=wds.reraise_exception,
            eof_value=None,
        )
        self.offset = -1

    def take(self, source: Source) -> bytes:
        for member in self.members:
            if member["fname"] == source.name:
                self.offset = source.offset
                content = member["data"]
                assert isinstance(content, bytes)
                return content
        raise EOFError(f"the stream ended before {source.name}")


_cursors: "OrderedDict[tuple[int, str], _Cursor]" = OrderedDict()


def _stream(source: Source) -> bytes:
    place = (os.getpid(), source.location)  # a stream inherited by fork is the parent's
    cursor = _cursors.pop(place, None)
    if cursor is None or cursor.offset >= source.offset:
        cursor = _Cursor(source.location)
    content = cursor.take(source)
    _cursors[place] = cursor  # only a cursor that gave what was asked is kept
    while len(_cursors) > OPEN_STREAMS:
        _cursors.popitem(last=False)
    return content
