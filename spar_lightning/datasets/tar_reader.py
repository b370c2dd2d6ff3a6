"""Strict reader for the images of a tar file.

Most readers stop silently at a truncated or damaged header, or at a block of zeros. Here every header must be valid,
every member must be complete, and the two zero blocks of the end-of-archive mark must follow, with nothing but zero
padding after them.
"""

import io
import posixpath
import tarfile
from collections.abc import Container, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Final, NamedTuple, cast

from spar_lightning.datasets.container import BLOCK
from spar_lightning.datasets.image_source import READ_ERRORS, is_image
from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.datasets.shard_stream import LARGEST, ShardStream
from spar_lightning.files.atomic import ACCESS_ERRORS
from spar_lightning.files.walk import is_hidden

ENDING: Final = 2 * BLOCK + 10240  # bytes: end-of-archive mark, and zeros up to the next multiple of tar's record size
CONTINUED: Final = b"M"  # type of the second part of a member in a multi-volume archive
MALFORMED: Final = (*READ_ERRORS, ValueError, OverflowError, RecursionError)  # raised by tarfile for damaged headers


class Member(NamedTuple):
    """Image of a shard.

    Attributes:
        key: Key of the image.
        name: Member of the tar, or path relative to the folder.
        offset: Offset of the first byte in the uncompressed tar; 0 for a file in a folder.
        content: Bytes of the image file, or the path of a large one; empty for a link.
        target: Normalized name of the member that a link points to; None for a file.
    """

    key: str
    name: str
    offset: int
    content: bytes | Path
    target: str | None = None

    def open(self) -> IO[bytes]:
        """Return the image file, opened for reading."""
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")


def walk_tar(location: str) -> Iterator[Member]:
    """Yield every image and every link with the name of an image in a tar, checking all headers and the end.

    Raises:
        ShardError: If the tar is empty or damaged, cannot be read, or contains an image in an unsupported form.
    """
    end = 0
    try:
        with ShardStream(location) as stream:
            file = cast(IO[bytes], stream)
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all members in memory
                    if is_image(member.name) and not _is_hidden(member.name):
                        yield from _image(member, stream, location)
                    end = tar.offset
            rest = stream.last + stream.read(ENDING + 1 - len(stream.last))  # tarfile has read the first block
            if len(rest) < 2 * BLOCK or rest.strip(b"\0"):
                raise tarfile.ReadError("expected a header or the end-of-archive mark")
            if len(rest) > ENDING:  # a block of zeros in the middle looks like the end
                raise tarfile.ReadError(f"more than {ENDING} bytes follow the last image")
    except ShardError:
        raise
    except MALFORMED as error:
        if isinstance(error, OSError) and error.errno in ACCESS_ERRORS:
            raise ShardError(
                f"{location} cannot be read ({error.strerror}). Make it readable; it may be intact."
            ) from error
        raise ShardError(
            f"{location} is damaged at byte {end}: {error}. Download it again, or leave it out."
        ) from error


def _image(member: tarfile.TarInfo, stream: ShardStream, location: str) -> Iterator[Member]:
    """Yield a member with the name of an image, unless it is a folder or device."""
    key, name = PurePosixPath(member.name).stem, member.name
    if member.type == CONTINUED:
        raise ShardError(
            f"{location}: {name} begins in another volume. Join the volumes of the archive, or pack it again without "
            "tar -M."
        )
    if member.islnk() or member.issym():
        folder = posixpath.dirname(name) if member.issym() else ""
        yield Member(key, name, member.offset_data, b"", posixpath.normpath(posixpath.join(folder, member.linkname)))
    if not member.isreg():
        return
    if member.issparse():
        raise ShardError(f"{location}: {name} is stored sparse. Pack the archive again without -S (--sparse).")
    if member.size > LARGEST:
        raise ShardError(
            f"{location}: {name} has {member.size:,} bytes. Image files may have at most {LARGEST:,}. Shrink or remove "
            "it."
        )
    content = stream.read(member.size)
    if len(content) != member.size:
        raise tarfile.ReadError(f"{name} is truncated")
    yield Member(key, name, member.offset_data, content)


def _is_hidden(name: str) -> bool:
    """Return whether a part of a member's name is hidden; `..` is not."""
    return is_hidden(PurePosixPath(*(part for part in PurePosixPath(name).parts if part != "..")))


def resolve_links(links: Mapping[str, str], images: Container[str], location: str) -> dict[str, str]:
    """Return the image that each link of a tar points to, possibly through other links.

    Args:
        links: Normalized names of links, and of their targets.
        images: Normalized names of the images.
        location: Location for the error message.

    Raises:
        ShardError: A link does not lead to an image in the same tar.
    """
    ends = {}
    for name in links:
        target = name
        for _ in links:
            if target not in links:
                break
            target = links[target]
        ends[name] = target
    lost = [name for name, target in ends.items() if target not in images]
    if lost:
        raise ShardError(
            f"{location}: {len(lost)} of {len(links)} links to images lead to no image in this archive (first: "
            f"{lost[0]!r} to {ends[lost[0]]!r}). Pack the archive again with tar -h --hard-dereference."
        )
    return ends
