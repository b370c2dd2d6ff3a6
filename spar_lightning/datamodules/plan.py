"""The plan: every source image with its place and its hash, from a strict scan of tar shards.

Local tars are read by offset and size, not streamed. A tar that is cut or damaged at a header ends
quietly in most readers; here every header must parse, every member must fit in the file, and the
two zero blocks at the end must be there.
"""

import hashlib
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand
from tqdm import tqdm

from spar_lightning.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class ShardError(UserError):
    """A tar shard is missing, empty or damaged."""


@dataclass(frozen=True)
class Source:
    """One image inside a tar: the key is the member's stem, offset and size are bytes of the tar."""

    key: str
    tar: str
    offset: int
    size: int
    digest: str  # blake2b of the bytes, 16 bytes as hex

    def read(self) -> bytes:
        """The image's bytes, checked against the hash.

        Raises:
            ShardError: The tar changed since it was scanned.
        """
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if _digest(content) != self.digest:
            raise ShardError(f"{self.tar}: the bytes of {self.key} changed after the scan. Restore the shard.")
        return content


def expand(shards: str | Sequence[str]) -> list[Path]:
    """Paths of shards from one brace pattern or a list of them, such as sa_{000000..000002}.tar.

    Raises:
        ShardError: The list is empty, or a file is missing.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    paths = [Path(path) for pattern in patterns for path in braceexpand(pattern)]
    missing = [path for path in paths if not path.is_file()]
    if not paths:
        raise ShardError("data.shards is empty. Give tar files, or a pattern such as sa1b/sa_{000000..000002}.tar.")
    if missing:
        raise ShardError(
            f"data.shards names {len(paths)} files, of which {len(missing)} do not exist, the first of them "
            f"{missing[0]}. Give existing tar files, or a pattern such as sa1b/sa_{{000000..000002}}.tar."
        )
    return paths


def scan(shards: str | Sequence[str], max_images: int | None = None) -> list[Source]:
    """List the images of all shards in order, at most `max_images`, with their hashes.

    Raises:
        ShardError: A shard is missing, damaged or without images, or a key stands for two different images.
    """
    by_key: dict[str, Source] = {}
    for path in tqdm(expand(shards), desc="scanning shards", unit="tar", leave=False):
        with open(path, "rb") as file:
            for key, offset, size in _members(path):
                file.seek(offset)
                source = Source(key, str(path), offset, size, _digest(file.read(size)))
                known = by_key.setdefault(key, source)
                if known.digest != source.digest:
                    raise ShardError(
                        f"The key {key} stands for two different images, in {known.tar} and in {source.tar}. "
                        "Keys are file names without folder and suffix; rename one of the two."
                    )
                if len(by_key) == max_images:
                    return list(by_key.values())
    return list(by_key.values())


def list_keys(shards: str | Sequence[str], max_images: int | None = None) -> list[str]:
    """The keys that `scan` gives, from the headers alone."""
    keys = dict.fromkeys(key for path in expand(shards) for key, _, _ in _members(path))
    return list(keys)[:max_images]


def _members(path: Path) -> list[tuple[str, int, int]]:
    """Key, offset and size in bytes of every image in a tar, after checking all of its headers."""
    size = path.stat().st_size
    if size == 0:
        raise ShardError(f"{path} is empty (0 bytes). Fetch it again, or leave it out of data.shards.")
    images = []
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512
                if end > size:
                    raise ShardError(_damaged(path, size, f"{member.name} should reach to byte {end}"))
                if member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES):
                    images.append((PurePosixPath(member.name).stem, member.offset_data, member.size))
    except tarfile.TarError as error:
        raise ShardError(_damaged(path, end, str(error))) from error
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(1024) != bytes(1024):
            raise ShardError(_damaged(path, end, "neither a header nor the end-of-archive mark"))
    if not images:
        raise ShardError(
            f"{path} holds no images ({' '.join(IMAGE_SUFFIXES)}). An SA-1B shard holds sa_1.jpg, sa_1.json, ..; "
            "leave this one out of data.shards."
        )
    return images


def _damaged(path: Path, byte: int, what: str) -> str:
    return f"{path} is damaged at byte {byte}: {what}. Fetch it again, or leave it out of data.shards."


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
