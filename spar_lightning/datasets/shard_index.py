"""Index of shards and image folders: location, size and hash of every image.

An index is stored under a name that depends on the shard's size and modification time. Each shard is therefore read
once, by the process that gets the lease, and again only if it changes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from braceexpand import braceexpand
from tqdm import tqdm

from spar_lightning.datasets.image_source import IMAGE_SUFFIXES, ShardError, Source, is_image, is_remote
from spar_lightning.datasets.image_table import Images, from_file, to_bytes
from spar_lightning.datasets.tar_reader import walk_tar
from spar_lightning.files.atomic import make_folder, publish, sweep
from spar_lightning.files.hashing import hash_bytes, hash_json
from spar_lightning.files.leases import Claims
from spar_lightning.files.work_queue import share
from spar_lightning.image.codec import image_size


def expand(shards: str | Sequence[str]) -> list[str]:
    """Expand one brace pattern, such as sa_{000000..000002}.tar, or a list of patterns to locations.

    A location is a tar file (plain or gzipped), a URL or a `pipe:` command that returns one, or an image folder.

    Raises:
        ShardError: If the list is empty, a pattern is invalid or a local file is missing.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    try:
        locations = [location for pattern in patterns for location in braceexpand(pattern)]
    except ValueError as error:
        raise ShardError(
            f"data.shards: invalid brace pattern {patterns} ({error}). Write {{000000..000002}}."
        ) from error
    missing = [location for location in locations if not is_remote(location) and not Path(location).exists()]
    if not locations:
        raise ShardError(
            "data.shards is empty. Set it to tar files, folders, or a pattern such as sa1b/sa_{000000..000002}.tar."
        )
    if missing:
        raise ShardError(
            f"data.shards: {len(missing)} of {len(locations)} shards do not exist (first: {missing[0]}). "
            "Set data.shards to existing tar files, folders, or a pattern such as sa1b/sa_{000000..000002}.tar."
        )
    return locations


def scan_all(locations: Sequence[str], root: Path, show: bool = True, known: Path | None = None) -> Images:
    """Return the images of all locations in order; new and changed shards are indexed first.

    Args:
        locations: Shards and image folders.
        root: Folder for the indexes (in `root`/scans), shared by all processes.
        show: Show a progress bar.
        known: Another folder, which is only read: indexes in `known`/scans are used.

    Raises:
        ShardError: If a location is missing, damaged or without images, or two different images have the same key.
    """
    folder, private, claims = root / "scans", root / "tmp", root / "claims"
    for path in (folder, private, claims):
        make_folder(path)
    sweep(private)
    names = {_scan_name(location): location for location in locations}
    bar: tqdm[Any]
    with tqdm(desc="indexing shards", unit="image", leave=False, disable=not show) as bar:

        def make(name: str) -> None:
            bar.set_postfix_str(PurePosixPath(names[name]).name, refresh=False)
            images = scan(names[name], lambda: bar.update())
            publish(folder / name, to_bytes(images), private)

        found = {name: known / "scans" / name for name in names if known and (known / "scans" / name).exists()}
        share([name for name in names if name not in found], Claims(claims), folder, make)
    return Images.concatenate([from_file(found.get(name, folder / name))[0] for name in names])


def scan(location: str, each: Callable[[], Any] = lambda: None) -> Images:
    """Index all images of one location; `each` is called once per image.

    Raises:
        ShardError: If the location is damaged or contains no images.
    """
    walk = _walk_folder if not is_remote(location) and Path(location).is_dir() else walk_tar
    sources, sizes = [], []
    for key, name, offset, content in walk(location):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ShardError(f"{location}: the name {name!r} is not valid UTF-8. Rename that image.") from error
        sources.append(Source(key, location, name, offset, len(content), hash_bytes(content).hex()))
        sizes.append(image_size(content))
        each()
    if not sources:
        raise ShardError(
            f"{location} contains no images ({' '.join(IMAGE_SUFFIXES)}). An SA-1B shard contains sa_1.jpg, sa_1.json "
            "and so on. Remove this location from data.shards."
        )
    return Images.concatenate([Images.collect(sources, sizes)])


def _scan_name(location: str) -> str:
    """Return the file name of a shard's index, which changes with the shard, or for a remote shard with its URL."""
    stamp: Any = None
    if not is_remote(location):
        path = Path(location)
        files = [path] if path.is_file() else [path / name for name in _files(path)]
        missing = [file for file in files if not file.exists()]
        if missing:
            raise ShardError(f"{missing[0]} is a link to a file that does not exist. Fix or remove the link.")
        stats = [file.stat() for file in files]
        stamp = [[str(f), s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)]
    name = hash_json([os.path.abspath(location) if stamp else location, stamp], 16)
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in PurePosixPath(location).name[:40])
    return f"{stem}-{name}.npz"


def _files(folder: Path) -> list[str]:
    """Return the images below a folder as sorted relative paths; each linked folder is entered once."""
    found, entered = [], set()
    for place, below, names in os.walk(folder, followlinks=True):
        entered.add(os.path.realpath(place))
        below[:] = sorted(name for name in below if os.path.realpath(os.path.join(place, name)) not in entered)
        found += [os.path.relpath(os.path.join(place, name), folder) for name in names if is_image(name)]
    return sorted(found)


def _walk_folder(location: str) -> Iterator[tuple[str, str, int, bytes]]:
    """Yield key, name, offset and bytes of every image below a folder; the key includes the subfolders."""
    for name in _files(Path(location)):
        try:
            content = (Path(location) / name).read_bytes()
        except OSError as error:
            raise ShardError(f"{location}: {name} cannot be read ({error.strerror}). Make it readable.") from error
        yield str(PurePosixPath(name).with_suffix("")), name, 0, content
