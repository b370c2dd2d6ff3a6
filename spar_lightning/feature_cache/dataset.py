"""Dataset of stage 2: cached images and features, read by many workers and ranks in parallel.

Each process opens shards itself, without locks, and keeps only the last few open. The sample lists are NumPy arrays,
which worker processes share; Python lists would be copied gradually by reference counting.
"""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from spar_lightning.datasets.samples import Sample
from spar_lightning.feature_cache.shard import CacheError, FeatureShard

OPEN_SHARDS: Final = 16  # per process


class CachedFeatures(Dataset[Sample]):
    """Dataset of the images and features of a feature cache.

    Args:
        folder: Folder of the shards.
        shards: Names of the shard files.
        keys: Key of each sample.
        shard: Index in `shards` of each sample's shard.
        row: Row of each sample in its shard.
        fingerprint: Fingerprint of the cache, which every shard must contain.
    """

    def __init__(
        self,
        folder: Path,
        shards: list[str],
        keys: NDArray[np.bytes_],
        shard: NDArray[np.int32],
        row: NDArray[np.int32],
        fingerprint: str,
    ) -> None:
        self.folder, self.shards = folder, shards
        self.keys, self.shard, self.row = keys, shard, row
        self.fingerprint = fingerprint
        self._open: OrderedDict[tuple[int, int], FeatureShard] = OrderedDict()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        shard, row = self.locate(index)
        return Sample(shard.keys[row], *shard.read(row))

    def locate(self, index: int) -> tuple[FeatureShard, int]:
        """Return the open shard of a sample and the sample's row in it.

        Raises:
            CacheError: The shard is damaged, or was replaced after it was indexed.
        """
        shard, row, key = self._shard(int(self.shard[index])), int(self.row[index]), self.keys[index].decode()
        if row >= len(shard.keys) or shard.keys[row] != key:
            raise CacheError(
                f"{shard.path} was replaced after it was indexed: row {row} is not {key}. "
                "Delete index.npz in the cache folder and start again."
            )
        return shard, row

    def _shard(self, number: int) -> FeatureShard:
        owner = (os.getpid(), number)  # a handle inherited by fork belongs to the parent
        shard = self._open.pop(owner, None) or FeatureShard(self.folder / self.shards[number], self.fingerprint)
        self._open[owner] = shard
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}
