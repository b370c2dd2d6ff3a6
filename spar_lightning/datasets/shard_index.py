"""A scan of shards and folders: every image with its place, its size and its hash.

Scans are kept under a name that holds the shard's size and time, so each shard is read once, by
whichever process claims it, and anew when it changes.
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
from spar_lightning.files.work_queue import Claims, share
from spar_lightning.image.codec import image_size


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
        make_folder(path)
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
    walk = _walk_folder if not is_remote(location) and Path(location).is_dir() else walk_tar
    sources, sizes = [], []
    for key, name, offset, content in walk(location):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ShardError(f"{location}: the name {name!r} is not in UTF-8. Rename that image.") from error
        sources.append(Source(key, location, name, offset, len(content), hash_bytes(content).hex()))
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
    name = hash_json([os.path.abspath(location) if stamp else location, stamp], 16)
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in PurePosixPath(location).name[:40])
    return f"{stem}-{name}.npz"


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
