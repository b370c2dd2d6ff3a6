"""Measure the bookkeeping of a cache build per shard of 64 images, at 1 million and at 11 million images.

    python scripts/measure_bookkeeping.py

The shards are empty files, and neither images nor features are computed: what remains is the time for choosing a shard,
its lease, the index and the progress bar. The builds are sampled when half of their shards are finished. The script
prints CPU time per shard and the times of listing the shards and of updating the index, which a build spends only
seldom. It also runs with older versions of the package (PYTHONPATH).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np
from tqdm import tqdm

from spar_lightning.datasets.augmentation import Record
from spar_lightning.datasets.image_source import Source, digest_array
from spar_lightning.datasets.image_table import Images
from spar_lightning.feature_cache import cache as cache_module
from spar_lightning.feature_cache import index as index_module
from spar_lightning.feature_cache.cache import FeatureCache
from spar_lightning.feature_cache.index import CacheIndex
from spar_lightning.feature_cache.shard import Entry, Rejected
from spar_lightning.files.atomic import publish
from spar_lightning.formatting import markdown

IDENTITY: Final = {"teacher": "stub"}
PER_SHARD: Final = 64
DIGEST: Final = f"{0:032x}"


class StubShard:
    """Shard whose keys follow from its file name."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        first = int(path.stem) * PER_SHARD
        self.keys = [f"sa_{i:08d}" for i in range(first, first + PER_SHARD)]
        self.digests, self.rejected = digest_array([DIGEST] * PER_SHARD), list[Rejected]()

    def __enter__(self) -> "StubShard":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def write_stub(path: Path, made: list[Entry | Rejected], fingerprint: str, private: Path) -> bool:
    """Publish an empty file."""
    return publish(path, b"", private)


def milliseconds(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the time of one call."""
    began = clock()
    function()
    return 1000 * (clock() - began)


def measure(root: Path, images: int, finished: float, sample: int) -> list[str]:
    """Build `sample` shards of a cache and return a row of the table."""
    count = images // PER_SHARD
    names = [f"{number:05d}.h5" for number in range(count)]
    cache = FeatureCache(root, IDENTITY)
    for name in names[: int(count * finished)]:
        (root / "shards" / name).touch()
    indexing = milliseconds(cache.index.refresh)
    shard = Images.collect([Source("sa_1", "a.tar", "sa_1.jpg", 0, 1, DIGEST)] * PER_SHARD, [(8, 8)] * PER_SHARD)
    entry = Entry("sa_1", DIGEST, b"", np.zeros((1, 1, 1), np.float16), Record(8, 8, 0, 0, 8, 8, False))
    began: list[float] = []

    def make(sources: Iterable[Source]) -> Iterator[Entry | Rejected]:
        began.append(time.process_time())
        if len(began) > sample:
            raise KeyboardInterrupt
        return iter([entry] * PER_SHARD)

    bar: tqdm[Any]
    with tqdm(total=count * PER_SHARD, disable=True) as bar, suppress(KeyboardInterrupt):
        cache._build(shard, dict.fromkeys(names, shard), make, bar)
    steps = 1000 * np.diff(began[1:])  # the first shard includes what is done once per build
    listing = milliseconds(lambda: os.listdir(root / "shards"))
    again = milliseconds(cache.index.refresh)
    mean, median = statistics.mean(steps), statistics.median(steps)
    return [
        f"{images:,}",
        f"{count:,}",
        f"{mean:.2f} ms",
        f"{median:.2f} ms",
        f"{listing:.0f} ms",
        f"{again:.0f} ms",
        f"{indexing / 1000:.1f} s",
    ]


def main() -> int:
    """Measure all sizes and print a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000_000, 11_000_000])
    parser.add_argument("--finished", type=float, default=0.5, help="fraction of the shards that are finished")
    parser.add_argument("--sample", type=int, default=20, help="number of shards to measure")
    given = parser.parse_args()
    rows = []
    with (
        patch.object(cache_module, "write_shard", write_stub),
        patch.object(cache_module, "FeatureShard", StubShard),
        patch.object(index_module, "FeatureShard", StubShard),
        patch.object(CacheIndex, "save", lambda self: None),
    ):
        for images in given.images:
            with tempfile.TemporaryDirectory(prefix="measure_bookkeeping-") as place:
                rows.append(measure(Path(place), images, given.finished, given.sample))
    head = ["images", "shards", "CPU per shard, mean", "median", "listing", "update of the index", "first index"]
    print(markdown([head, *rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
