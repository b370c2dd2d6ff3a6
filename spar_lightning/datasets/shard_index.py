"""Index of shards and image folders: location, size and hash of every image.

An index is stored under a name that depends on the shard's size and modification time. Each shard is therefore read
once, by the process that gets the lease, and again only if it changes.
"""

import errno
import logging
import os
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from braceexpand import braceexpand
from tqdm import tqdm

from spar_lightning.datasets.folder_reader import images_below, status, walk_folder
from spar_lightning.datasets.image_source import IMAGE_SUFFIXES, Source
from spar_lightning.datasets.image_table import Images, from_file, to_bytes
from spar_lightning.datasets.remote_shard import check_scheme, is_remote
from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.datasets.tar_reader import Member, resolve_links, walk_tar
from spar_lightning.files.atomic import ACCESS_ERRORS, make_folder, publish, sweep
from spar_lightning.files.hashing import hash_json, hash_stream
from spar_lightning.files.leases import Claims
from spar_lightning.files.work_queue import share
from spar_lightning.image.codec import image_size

LONGEST: Final = 1000  # bytes of a name; every row of a table has room for the longest name

log = logging.getLogger("spar_lightning")


def expand(shards: str | Sequence[str]) -> list[str]:
    """Expand one brace pattern, such as sa_{000000..000002}.tar, or a list of patterns to locations.

    A location is a tar file (plain or gzipped), a URL or a `pipe:` command that returns one, or an image folder. The
    path of an existing file or folder is not a pattern, even if it contains braces.

    Raises:
        ShardError: If the list is empty, a pattern is invalid, a local file is missing or an address cannot be opened.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    try:
        locations = [location for pattern in patterns for location in _expanded(pattern)]
    except ValueError as error:
        raise ShardError(
            f"data.shards: invalid brace pattern {patterns} ({error}). Write {{000000..000002}}."
        ) from error
    if not locations:
        raise ShardError(
            "data.shards is empty. Set it to tar files, folders, or a pattern such as sa1b/sa_{000000..000002}.tar."
        )
    for location in filter(is_remote, locations):
        check_scheme(location)
    missing = [location for location in locations if not is_remote(location) and not _exists(location)]
    if missing:
        raise ShardError(
            f"data.shards: {len(missing)} of {len(locations)} shards do not exist (first: {missing[0]}). "
            "Set data.shards to existing tar files, folders, or a pattern such as sa1b/sa_{000000..000002}.tar."
        )
    return locations


def _expanded(pattern: str) -> list[str]:
    # A backslash is an escape character only in a pattern.
    literal = "{" not in pattern or (not is_remote(pattern) and os.path.exists(pattern))
    return [pattern] if literal else list(braceexpand(pattern))


def _exists(location: str) -> bool:
    try:
        os.stat(location)
    except OSError as error:
        if error.errno in ACCESS_ERRORS - {errno.ENOENT}:
            raise ShardError(f"data.shards: {location} cannot be read ({error.strerror}). Make it readable.") from error
        return False
    return True


def scan_all(
    locations: Sequence[str], root: Path, show: bool = True, known: Path | None = None, whole_names: bool = False
) -> Images:
    """Return the images of all locations in order; new and changed shards are indexed first.

    Args:
        locations: Shards and image folders.
        root: Folder for the indexes (in `root`/scans), shared by all processes.
        show: Show a progress bar.
        known: Another folder, which is only read: indexes in `known`/scans are used. If it contains all of them,
            nothing is written.
        whole_names: Whether keys are paths with suffix, in the folder or the tar.

    Raises:
        ShardError: If a location is missing, damaged or without images, or two different images have the same key.
    """
    folder, private, claims = root / "scans", root / "tmp", root / "claims"
    names = {_scan_name(location): location for location in locations}
    found = {name: known / "scans" / name for name in names if known and (known / "scans" / name).exists()}
    missing = [name for name in names if name not in found]
    for path in (folder, private, claims) if missing else ():
        make_folder(path)
    sweep(private)
    bar: tqdm[Any]
    with tqdm(desc="indexing shards", unit="image", leave=False, disable=not show) as bar:

        def make(name: str) -> None:
            bar.set_postfix_str(PurePosixPath(names[name]).name, refresh=False)
            images = scan(names[name], lambda: bar.update(), whole_names)
            publish(folder / name, to_bytes(images), private)

        if missing:
            share(missing, Claims(claims), folder, make)
    return Images.concatenate([from_file(found.get(name, folder / name))[0] for name in names])


def scan(location: str, each: Callable[[], Any] = lambda: None, whole_names: bool = False) -> Images:
    """Index all images of one location; `each` is called once per image.

    With `whole_names`, keys are paths with suffix, as in the folder or the tar.

    Raises:
        ShardError: If the location is damaged or contains no images.
        FolderError: If a folder cannot be read.
    """
    walk = walk_folder if not is_remote(location) and Path(location).is_dir() else walk_tar
    sources, sizes = [], []
    links: dict[str, Member] = {}
    for member in walk(location):
        _check_name(member.name, location)
        if member.target is not None:
            links[posixpath.normpath(member.name)] = member
            continue
        try:
            with member.open() as file:
                digest, length = hash_stream(file).hex(), file.tell()
                sizes.append(image_size(file))
        except OSError as error:
            raise ShardError(
                f"{location}: {member.name} cannot be read ({error.strerror}). Make it readable."
            ) from error
        sources.append(Source(member.key, location, member.name, member.offset, length, digest))
        each()
    if links:
        sources, sizes = _with_links(sources, sizes, links, location)
    if not sources:
        raise ShardError(
            f"{location} contains no images ({' '.join(IMAGE_SUFFIXES)}; hidden files and __MACOSX are left out). An "
            "SA-1B shard contains sa_1.jpg, sa_1.json and so on. Leave this location out."
        )
    if whole_names:
        sources = [replace(source, key=source.name) for source in sources]
    else:
        _warn_of_annotations([source.key for source in sources], location)
    return Images.concatenate([Images.collect(sources, sizes)])


def _check_name(name: str, location: str) -> None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise ShardError(f"{location}: the name {name!r} is not valid UTF-8. Rename that image.") from error
    if size > LONGEST:
        raise ShardError(
            f"{location}: the name {name[:40]!r}.. has {size} bytes. At most {LONGEST} are allowed. Rename that image."
        )


def _with_links(
    sources: list[Source], sizes: list[tuple[int, int]], links: dict[str, Member], location: str
) -> tuple[list[Source], list[tuple[int, int]]]:
    """Add the images of links: reading a link is reading its target. A link follows its target, as streams need it."""
    places = {posixpath.normpath(source.name): i for i, source in enumerate(sources)}
    targets = {name: member.target or "" for name, member in links.items()}
    for name, target in resolve_links(targets, places, location).items():
        source = sources[places[target]]
        sources.append(replace(source, key=links[name].key, name=links[name].name))
        sizes.append(sizes[places[target]])
    order = sorted(range(len(sources)), key=lambda i: sources[i].offset)
    return [sources[i] for i in order], [sizes[i] for i in order]


def _warn_of_annotations(keys: list[str], location: str) -> None:
    """Warn of images that are named after another one, such as x.seg.png next to x.jpg: they may be masks."""
    known = set(keys)
    named = [key for key in keys if "." in key and key.rpartition(".")[0] in known]
    if named:
        log.warning(
            "%s: %d of %d images are named after another image (first: %s). They are used for training. If they are "
            "masks, exclude them with data.keys.",
            *(location, len(named), len(keys), named[0]),
        )


def _scan_name(location: str) -> str:
    """Return the file name of a shard's index, which changes with the shard, or for a remote shard with its URL."""
    stamp: Any = None
    if not is_remote(location):
        path = Path(location)
        files = [path / name for name in images_below(path)] if path.is_dir() else [path]
        stats = [status(file) for file in files]
        stamp = [[str(f), s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)]
    name = hash_json([os.path.abspath(location) if stamp else location, stamp], 16)
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in PurePosixPath(location).name[:40])
    return f"{stem}-{name}.npz"
