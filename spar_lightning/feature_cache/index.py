"""Index of a feature cache: sample key -> shard and row, and the list of unusable images.

The index is built from the headers of the shards and saved in index.npz, so that a start need not open every shard.
The shards take precedence over the saved index: a shard with a different size or modification time is read again, a
damaged index.npz is rebuilt, and every sample is checked against its key and CRC when it is read.
"""

import io
import json
import logging
import os
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datasets.image_source import digest_array, key_array
from spar_lightning.datasets.image_table import find
from spar_lightning.feature_cache.shard import CacheError, FeatureShard, Rejected
from spar_lightning.files.atomic import ACCESS_ERRORS, replace
from spar_lightning.files.work_queue import Throttle

log = logging.getLogger("spar_lightning")


def shard_names(root: Path) -> set[str]:
    """Return the file names of the published shards; temporary files of copy tools and file systems are ignored.

    Raises:
        CacheError: The folder of the shards is missing.
    """
    try:
        return {name for name in os.listdir(root / "shards") if re.fullmatch(r"\d+\.h5", name)}
    except FileNotFoundError as error:
        raise CacheError(f"{root} has no folder shards: it was not copied completely. Copy it again.") from error


class CacheIndex:
    """Index of the published shards of a feature cache.

    Args:
        root: Folder of the cache.
        fingerprint: Fingerprint of the cache, which every shard must contain.
    """

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.root, self.fingerprint = root, fingerprint
        self._keys: dict[str, NDArray[np.bytes_]] = {}  # shard -> keys in the order of its rows
        self._digests: dict[str, NDArray[np.uint64]] = {}  # shard -> digests of the source images (n, 2)
        self._rejected: dict[str, list[Rejected]] = {}
        self._stamps: dict[str, tuple[int, int]] = {}
        self._images = self._unusable = 0  # numbers of entries, so that a build need not add up all shards
        self._changed = self._compared = False
        self._listing = Throttle()
        self._load()

    @property
    def path(self) -> Path:
        """Path of the saved index."""
        return self.root / "index.npz"

    @property
    def numbers(self) -> NDArray[np.int32]:
        """Numbers of the published shards."""
        return np.array([int(Path(name).stem) for name in self._stamps], np.int32)

    @property
    def quarantined(self) -> int:
        """Number of entries for images that cannot be used."""
        return self._unusable

    def __len__(self) -> int:
        """Return the number of images with features."""
        return self._images

    def refresh(self) -> None:
        """Add new shards to the index and remove deleted ones.

        Sizes and modification times are compared only in the first call: published shards do not change, and checking
        a hundred thousand files on a network file system takes minutes.

        Raises:
            CacheError: A shard is damaged.
        """
        with self._listing:
            names = shard_names(self.root)
            for name in self._stamps.keys() - names:
                self._forget(name)
            unsure, self._compared = names - self._stamps.keys() if self._compared else names, True
        for name in sorted(unsure):
            self.add(name)

    def refresh_seldom(self) -> None:
        """Like `refresh`, but do nothing if listing the shards would take more than a small fraction of the time."""
        if self._listing.due():
            self.refresh()

    def add(self, name: str) -> None:
        """Add or update one shard without listing the others; remove it if the file does not exist.

        Raises:
            CacheError: The shard is damaged.
        """
        path = self.root / "shards" / name
        try:
            stat = path.stat()
            stamp = (stat.st_size, stat.st_mtime_ns)
            if self._stamps.get(name) == stamp:
                return
            with FeatureShard(path, self.fingerprint) as shard:
                columns = key_array(shard.keys), shard.digests, shard.rejected
        except Exception:
            if path.exists():
                raise
            self._forget(name)  # deleted by another process in the meantime
            return
        self._forget(name)
        self._insert(name, stamp, *columns)
        self._changed = True

    def _insert(
        self,
        name: str,
        stamp: tuple[int, int],
        keys: NDArray[np.bytes_],
        digests: NDArray[np.uint64],
        rejected: list[Rejected],
    ) -> None:
        self._stamps[name], self._keys[name], self._digests[name], self._rejected[name] = stamp, keys, digests, rejected
        self._images, self._unusable = self._images + len(keys), self._unusable + len(rejected)

    def _forget(self, name: str) -> None:
        if name not in self._stamps:
            return
        self._images, self._unusable = self._images - len(self._keys[name]), self._unusable - len(self._rejected[name])
        del self._keys[name], self._digests[name], self._rejected[name], self._stamps[name]
        self._changed = True

    def save(self) -> None:
        """Save the index for the next start, unless it is already saved or the cache is read-only."""
        if not self._changed:
            return
        names, keys, digests = self._columns()
        shards = {name: [*self._stamps[name], len(self._keys[name]), self._rejected[name]] for name in names}
        header = json.dumps({"fingerprint": self.fingerprint, "shards": shards}).encode()
        buffer = io.BytesIO()
        np.savez(buffer, header=np.frombuffer(header, np.uint8), keys=keys, digests=digests)
        try:
            replace(self.path, buffer.getbuffer(), self.root / "tmp")
        except OSError as error:
            if error.errno not in ACCESS_ERRORS:
                raise
        self._changed = False

    def _load(self) -> None:
        try:
            with np.load(self.path) as archive:
                header, keys, digests = json.loads(archive["header"].tobytes()), archive["keys"], archive["digests"]
            if header["fingerprint"] != self.fingerprint:
                raise ValueError("it belongs to another cache")
        except FileNotFoundError:
            return
        except Exception as error:  # damaged archives raise many exception types; the index can be rebuilt
            log.warning("%s cannot be used (%s); it is rebuilt from the shards.", self.path, error)
            return
        first = 0
        for name, (size, time, count, rejected) in header["shards"].items():
            rows = slice(first, first + count)
            self._insert(name, (size, time), keys[rows], digests[rows], [Rejected(*item) for item in rejected])
            first += count

    def places(self) -> tuple[list[str], NDArray[np.bytes_], NDArray[np.int32], NDArray[np.int32]]:
        """Return shard names, and for all samples, sorted by key: key, index in the shard names, row in the shard."""
        names, keys, _ = self._columns()
        counts = [len(self._keys[name]) for name in names]
        shard = np.repeat(np.arange(len(names), dtype=np.int32), counts)
        row = np.concatenate([np.empty(0, np.int32), *(np.arange(count, dtype=np.int32) for count in counts)])
        _, first = np.unique(keys, return_index=True)  # if two builders computed an image, use the first
        return names, keys[first], shard[first], row[first]

    def sources(self) -> tuple[NDArray[np.bytes_], NDArray[np.uint64]]:
        """Return sorted keys and source digests (n, 2) of all images with features."""
        _, keys, digests = self._columns()
        keys, first = np.unique(keys, return_index=True)
        return keys, digests[first]

    def _columns(self) -> tuple[list[str], NDArray[np.bytes_], NDArray[np.uint64]]:
        """Return shard names, and the concatenated keys and digests of their rows."""
        names = sorted(self._keys)
        keys = np.concatenate([key_array([]), *(self._keys[name] for name in names)])
        return names, keys, np.concatenate([digest_array([]), *(self._digests[name] for name in names)])

    def rejected(self) -> dict[str, tuple[Rejected, str]]:
        """Return unusable images by key, each with the shard that lists it; images fixed since then are excluded."""
        found = {item.key: (item, name) for name, part in sorted(self._rejected.items()) for item in part}
        if not found:
            return {}
        fixed = find(self.sources()[0], key_array(found)) >= 0
        return {key: value for (key, value), done in zip(found.items(), fixed, strict=True) if not done}
