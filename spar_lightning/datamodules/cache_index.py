"""What lies where in a cache: key -> shard and row, and what was rejected.

The index is read from the shards' own headers and kept in index.npz to spare opening every shard at
each start. It is never believed over a shard: one whose size or time differs from the kept entry is
read again, a damaged index.npz is made anew, and every sample is compared with its key and CRC when it is read.
"""

import io
import json
import logging
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spar_lightning.datamodules.durable import replace
from spar_lightning.datamodules.feature_shard import FeatureShard

log = logging.getLogger("spar_lightning")


class CacheIndex:
    """The published shards of a cache.

    Args:
        root: Folder of the cache.
        fingerprint: Identity that every shard must carry.
    """

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.root, self.fingerprint = root, fingerprint
        self._keys: dict[str, NDArray[np.bytes_]] = {}  # by shard, in the order of its rows
        self._rejected: dict[str, dict[str, str]] = {}
        self._stamps: dict[str, tuple[int, int]] = {}
        self._load()

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return self.root / "index.npz"

    def rejected_by_shard(self) -> dict[str, dict[str, str]]:
        """Per shard with such images: key and reason of every image that cannot be used."""
        return {name: self._rejected[name] for name in sorted(self._rejected) if self._rejected[name]}

    @property
    def rejected(self) -> dict[str, str]:
        """Key and reason of every image that cannot be used."""
        return {key: reason for part in self._rejected.values() for key, reason in part.items()}

    @property
    def numbers(self) -> NDArray[np.int32]:
        """Numbers of the published shards."""
        return np.array([int(Path(name).stem) for name in self._stamps], np.int32)

    def rejected_keys(self) -> NDArray[np.bytes_]:
        """Keys of the images that cannot be used, ascending."""
        keys = sorted(key.encode() for key in self.rejected)
        return np.array(keys, "S" if keys else "S1")

    def __len__(self) -> int:
        """Images with features."""
        return sum(map(len, self._keys.values()))

    def refresh(self) -> None:
        """Read the shards that are new, and forget those that are gone.

        Raises:
            CacheError: A shard is damaged.
        """
        found = {entry.name: _stamp(entry.stat()) for entry in os.scandir(self.root / "shards")}
        for name in self._stamps.keys() - found.keys():
            self._forget(name)
        for name in sorted(name for name, stamp in found.items() if self._stamps.get(name) != stamp):
            with FeatureShard(self.root / "shards" / name, self.fingerprint) as shard:
                self._keys[name] = np.array([key.encode() for key in shard.keys], "S" if shard.keys else "S1")
                self._rejected[name] = shard.rejected
            self._stamps[name] = found[name]

    def _forget(self, name: str) -> None:
        del self._keys[name], self._rejected[name], self._stamps[name]

    def save(self) -> None:
        """Keep it for the next start."""
        names = sorted(self._stamps)
        header = {name: [*self._stamps[name], len(self._keys[name]), self._rejected[name]] for name in names}
        keys = np.concatenate([self._keys[name] for name in names]) if names else np.empty(0, "S1")
        buffer = io.BytesIO()
        np.savez(buffer, header=np.frombuffer(json.dumps(header).encode(), np.uint8), keys=keys)
        replace(self.path, buffer.getbuffer(), self.root / "tmp")

    def _load(self) -> None:
        try:
            with np.load(self.path) as archive:
                header, keys = json.loads(archive["header"].tobytes()), archive["keys"]
        except FileNotFoundError:
            return
        except Exception as error:  # a damaged archive fails in many ways; the shards hold all that it held
            log.warning("%s is damaged (%s); it is made again from the shards.", self.path, error)
            return
        first = 0
        for name, (size, time, count, rejected) in header.items():
            self._keys[name] = keys[first : first + count]
            self._stamps[name], self._rejected[name] = (size, time), rejected
            first += count

    def places(self) -> tuple[list[str], NDArray[np.bytes_], NDArray[np.int32], NDArray[np.int32]]:
        """Shard names, and for every sample in ascending order of keys: key, number of its shard, row in it."""
        names = sorted(self._keys)
        if not len(self):
            return names, np.empty(0, "S1"), np.empty(0, np.int32), np.empty(0, np.int32)
        keys = np.concatenate([self._keys[name] for name in names])
        shard = np.repeat(np.arange(len(names), dtype=np.int32), [len(self._keys[name]) for name in names])
        row = np.concatenate([np.arange(len(self._keys[name]), dtype=np.int32) for name in names])
        _, first = np.unique(keys, return_index=True)  # of an image that two builders made, the first is taken
        return names, keys[first], shard[first], row[first]


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns
