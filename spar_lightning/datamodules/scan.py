"""A strict scan of shards and folders: every image with its place, its size and its hash.

A tar that is cut or damaged at a header ends quietly in most readers. Here every header must parse,
every member must be there in full, and the two zero blocks of the end must follow. Scans are kept
under a name that holds the shard's size and time, so each shard is read once, by whichever process
claims it, and anew when it changes.
"""

import gzip
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final, cast

import webdataset as wds
from braceexpand import braceexpand
from tqdm import tqdm

from spar_lightning.datamodules.claims import Claims, share
from spar_lightning.datamodules.durable import publish, sweep
from spar_lightning.datamodules.image import image_size
from spar_lightning.datamodules.images import Images, from_file, to_bytes
from spar_lightning.datamodules.source import (
    IMAGE_SUFFIXES,
    READ_ERRORS,
    ShardError,
    Source,
    digest,
    is_image,
    is_remote,
    is_streamed,
)

BLOCK: Final = 512  # bytes; a tar consists of these
ENDING: Final = 2 * BLOCK + 10240  # bytes: the mark, and zeros up to the next multiple of tar's record
KEPT: Final = 1 << 16  # last bytes of a stream that are kept for the check of its end
GZIP_MAGIC: Final = b"\x1f\x8b"


def expand(shards: str | Sequence[str]) -> list[str]:
    """Locations of shards from one brace pattern or a list of them, such as sa_{000000..000002}.tar.

    A location is a tar (plain or gzipped), a URL or a `pipe:` command that gives one, or a folder of images.

    Raises:
        ShardError: The list is empty, or a local file is missing.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    try:
        locations = [location for pattern in patterns for location in braceexpand(pattern)]
    except ValueError as error:
        raise ShardError(f"data.shards: {patterns} is no brace pattern ({error}). Write {{000000..000002}}.") from error
    missing = [location for location in locations if not is_remote(location) and not Path(location).exists()]
    if not locations:
        raise ShardError(
            "data.shards is empty. Give tar files or folders, or a pattern such as sa1b/sa_{000000..000002}.tar."
        )
    if missing:
        raise ShardError(
            f"data.shards names {len(locations)} files, of which {len(missing)} do not exist, the first of them "
            f"{missing[0]}. Give existing tar files or folders, or a pattern such as sa1b/sa_{{000000..000002}}.tar."
        )
    return locations


def scan_all(locations: Sequence[str], root: Path, show: bool = True) -> Images:
    """The images of all locations in order; scans lie in `root`/scans and are shared by all processes.

    Raises:
        ShardError: A location is missing, damaged or without images, or a key stands for two different images.
    """
    folder, private, claims = root / "scans", root / "tmp", root / "claims"
    for path in (folder, private, claims):
        path.mkdir(parents=True, exist_ok=True)
    sweep(private)
    names = {_scan_name(location): location for location in locations}
    bar: tqdm[Any]
    with tqdm(desc="scanning shards", unit="image", leave=False, disable=not show) as bar:

        def make(name: str) -> None:
            bar.set_postfix_str(PurePosixPath(names[name]).name, refresh=False)
            images = scan(names[name], lambda: bar.update())
            publish(folder / name, to_bytes(images), private)

        share(list(names), Claims(claims), lambda: set(os.listdir(folder)), make)
    return Images.concatenate([from_file(folder / name)[0] for name in names])


def scan(location: str, each: Callable[[], Any] = lambda: None) -> Images:
    """Every image of one location, with its hash; `each` is called once per image.

    Raises:
        ShardError: The location is damaged or without images.
    """
    walk = _walk_folder if not is_remote(location) and Path(location).is_dir() else _walk_tar
    sources, sizes = [], []
    for key, name, offset, content in walk(location):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ShardError(f"{location}: the name {name!r} is not in UTF-8. Rename that image.") from error
        sources.append(Source(key, location, name, offset, len(content), digest(content)))
        sizes.append(image_size(content))
        each()
    if not sources:
        raise ShardError(
            f"{location} holds no images ({' '.join(IMAGE_SUFFIXES)}). An SA-1B shard holds sa_1.jpg, sa_1.json, ..; "
            "leave this one out of data.shards."
        )
    return Images.concatenate([Images.collect(sources, sizes)])


def _scan_name(location: str) -> str:
    """File name of a scan: another one when the shard has changed. Of a remote shard only the location is known."""
    stamp: Any = None
    if not is_remote(location):
        path = Path(location)
        files = [path] if path.is_file() else [path / name for name in _files(path)]
        missing = [file for file in files if not file.exists()]
        if missing:
            raise ShardError(f"{missing[0]} is a link to a file that does not exist. Mend or remove the link.")
        stats = [file.stat() for file in files]
        stamp = [[str(f), s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)]
    text = json.dumps([os.path.abspath(location) if stamp else location, stamp])
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in PurePosixPath(location).name[:40])
    return f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"


def _files(folder: Path) -> list[str]:
    """Images below a folder, as sorted relative paths; a folder that is linked twice is entered once."""
    found, entered = [], set()
    for place, below, names in os.walk(folder, followlinks=True):
        entered.add(os.path.realpath(place))
        below[:] = sorted(name for name in below if os.path.realpath(os.path.join(place, name)) not in entered)
        found += [os.path.relpath(os.path.join(place, name), folder) for name in names if is_image(name)]
    return sorted(found)


def _walk_folder(location: str) -> Iterator[tuple[str, str, int, bytes]]:
    """Key, name, offset and bytes of every image below a folder; the key keeps the path inside the folder."""
    for name in _files(Path(location)):
        try:
            content = (Path(location) / name).read_bytes()
        except OSError as error:
            raise ShardError(f"{location}: {name} cannot be read ({error.strerror}). Make it readable.") from error
        yield str(PurePosixPath(name).with_suffix("")), name, 0, content


def _walk_tar(location: str) -> Iterator[tuple[str, str, int, bytes]]:
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

    def read(self, size: int = -1) -> bytes:
        if self.start:
            start, self.start = self.start[:size] if size >= 0 else self.start, b"" if size < 0 else self.start[size:]
            return start + bytes(self.file.read(size - len(start) if size >= 0 else -1))
        content: bytes = self.file.read(size)
        return content

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
