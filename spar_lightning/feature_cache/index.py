"""What lies where in a cache: key -> shard and row, and what was rejected.

The index is read from the shards' own headers and kept in index.npz to spare opening every shard at
each start. It is never believed over a shard: one whose size or time differs from the kept entry is
read again, a damaged index.npz is made anew, and every sample is compared with its key and CRC when it is read.
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
from spar_lightning.feature_cache.shard import FeatureShard, Rejected
from spar_lightning.files.atomic import ACCESS_ERRORS, replace

log = logging.getLogger("spar_lightning")


def shard_names(root: Path) -> set[str]:
    """Published shards of a cache; what copying tools and file systems put beside them is passed over."""
    return {name for name in os.listdir(root / "shards") if re.fullmatch(r"\d+\.h5", name)}


class CacheIndex:
    """The published shards of a cache.

    Args:
        root: Folder of the cache.
        fingerprint: Identity that every shard must carry.
    """

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.root, self.fingerprint = root, fingerprint
        self._keys: dict[str, NDArray[np.bytes_]] = {}  # by shard, in the order of its rows
        self._digests: dict[str, NDArray[np.uint64]] = {}  # of the source images, (n, 2)
        self._rejected: dict[str, list[Rejected]] = {}
        self._stamps: dict[str, tuple[int, int]] = {}
        self._changed = self._compared = False
        self._load()

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return self.root / "index.npz"

    @property
    def numbers(self) -> NDArray[np.int32]:
        """Numbers of the published shards."""
        return np.array([int(Path(name).stem) for name in self._stamps], np.int32)

    @property
    def quarantined(self) -> int:
        """Number of entries for images that cannot be used."""
        return sum(map(len, self._rejected.values()))

    def __len__(self) -> int:
        """Images with features."""
        return sum(map(len, self._keys.values()))

    def refresh(self) -> None:
        """Read the shards that are new, and forget those that are gone.

        Sizes and times are compared the first time only: a published shard does not change, and asking a network
        file system about a hundred thousand of them takes minutes.

        Raises:
            CacheError: A shard is damaged.
        """
        names = shard_names(self.root)
        for name in self._stamps.keys() - names:
            self._forget(name)
        unsure, self._compared = names - self._stamps.keys() if self._compared else names, True
        for name in sorted(unsure):
            path = self.root / "shards" / name
            try:
                stat = path.stat()
                stamp = (stat.st_size, stat.st_mtime_ns)
                if self._stamps.get(name) == stamp:
                    continue
                with FeatureShard(path, self.fingerprint) as shard:
                    self._keys[name] = key_array(shard.keys)
                    self._digests[name], self._rejected[name] = shard.digests, shard.rejected
            except Exception:
                if path.exists():
                    raise
                if name in self._stamps:  # somebody has just deleted it
                    self._forget(name)
                continue
            self._stamps[name], self._changed = stamp, True

    def _forget(self, name: str) -> None:
        del self._keys[name], self._digests[name], self._rejected[name], self._stamps[name]
        self._changed = True

    def save(self) -> None:
        """Keep it for the next start, unless it is kept already or the cache is for reading only."""
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
        except Exception as error:  # a damaged archive fails in many ways; the shards hold all that it held
            log.warning("%s cannot be used (%s); it is made again from the shards.", self.path, error)
            return
        first = 0
        for name, (size, time, count, rejected) in header["shards"].items():
            self._keys[name], self._digests[name] = keys[first : first + count], digests[first : first + count]
            self._stamps[name], self._rejected[name] = (size, time), [Rejected(*item) for item in rejected]
            first += count

    def places(self) -> tuple[list[str], NDArray[np.bytes_], NDArray[np.int32], NDArray[np.int32]]:
        """Shard names, and for every sample in ascending order of keys: key, number of its shard, row in it."""
        names, keys, _ = self._columns()
        counts = [len(self._keys[name]) for name in names]
        shard = np.repeat(np.arange(len(names), dtype=np.int32), counts)
        row = np.concatenate([np.empty(0, np.int32), *(np.arange(count, dtype=np.int32) for count in counts)])
        _, first = np.unique(keys, return_index=True)  # of an image that two builders made, the first is taken
        return names, keys[first], shard[first], row[first]

    def sources(self) -> tuple[NDArray[np.bytes_], NDArray[np.uint64]]:
        """Keys, ascending, and source digests (n, 2) of all images with features."""
        _, keys, digests = self._columns()
        keys, first = np.unique(keys, return_index=True)
        return keys, digests[first]

    def _columns(self) -> tuple[list[str], NDArray[np.bytes_], NDArray[np.uint64]]:
        """Shard names, and keys and digests of all their rows, one shard behind the other."""
        names = sorted(self._keys)
        keys = np.concatenate([key_array([]), *(self._keys[name] for name in names)])
        return names, keys, np.concatenate([digest_array([]), *(self._digests[name] for name in names)])

    def rejected(self) -> dict[str, tuple[Rejected, str]]:
        """By key: images that cannot be used, each with the shard that lists it; not those mended since."""
        found = {item.key: (item, name) for name, part in sorted(self._rejected.items()) for item in part}
        if not found:
            return {}
        mended = find(self.sources()[0], key_array(found)) >= 0
        return {key: value for (key, value), done in zip(found.items(), mended, strict=True) if not done}
