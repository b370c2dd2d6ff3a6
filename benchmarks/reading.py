"""Reading a cache through the DataLoader, against raw reads of the same bytes.

    python benchmarks/reading.py

Samples have the size of the released configuration with a ViT-B/16: a photograph of 1152 x 768 pixels and
3456 x 768 numbers in float16. A ratio within one run; both read from the page cache, so the disk is not
measured but what lies above it: HDF5, two checksums, decoding the images, the hand-over between processes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F

from spar_lightning.datamodules.augmentation import Record
from spar_lightning.datamodules.feature_cache import FeatureCache
from spar_lightning.datamodules.feature_shard import Entry
from spar_lightning.datamodules.image import decode_image, encode_image
from spar_lightning.datamodules.images import Images
from spar_lightning.datamodules.loader import EpochOrder, ResumableLoader
from spar_lightning.datamodules.source import Source
from spar_lightning.markdown import markdown

HEIGHT, WIDTH, PATCH, CHANNELS = 768, 1152, 16, 768
PER_SHARD = 6  # so that there are more shards than a process keeps open, as in a real cache


def build(root: Path, count: int) -> FeatureCache:
    """A cache of `count` samples of one photograph and random features."""
    photo = torch.from_numpy(skimage.data.coffee()).permute(2, 0, 1)[None].float()  # type: ignore[no-untyped-call]
    pixels = F.interpolate(photo, (HEIGHT, WIDTH), mode="bicubic")[0].clamp(0, 255).to(torch.uint8)
    content = encode_image(pixels)
    rng = np.random.default_rng(0)

    def make(source: Source) -> Entry:
        features = rng.standard_normal((HEIGHT // PATCH, WIDTH // PATCH, CHANNELS), np.float32).astype(np.float16)
        return Entry(source.key, source.digest, content, features, Record(HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH, False))

    cache = FeatureCache(root, {"teacher": "random"})
    for first in range(0, count, PER_SHARD):
        numbers = range(first, min(first + PER_SHARD, count))
        sources = [Source(f"sa_{i}", "photo.tar", f"sa_{i}.jpg", 0, 0, f"{i:032x}") for i in numbers]
        cache.build(Images.collect(sources, [(HEIGHT, WIDTH)] * len(sources)), make, show=False)
    return cache


def raw(cache: FeatureCache) -> float:
    """Seconds for reading all shard files as they are."""
    start = time.perf_counter()
    for path in sorted((cache.root / "shards").iterdir()):
        path.read_bytes()
    return time.perf_counter() - start


def loaded(cache: FeatureCache, count: int, workers: int) -> float:
    """Seconds for one epoch through the loader, its processes already started."""
    dataset = cache.dataset(np.array([f"sa_{i}".encode() for i in range(count)]))
    order = EpochOrder(len(dataset), 1, 0, 1, seed=0)
    loader = ResumableLoader(dataset, order, workers)
    for _ in loader:  # the first epoch starts the processes and opens the shards
        pass
    order.set_epoch(1)
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start


def decoded(cache: FeatureCache, count: int) -> float:
    """Seconds for decoding the stored images alone, in one process."""
    photo = encode_image(cache.dataset(np.array([b"sa_0"]))[0].image)
    start = time.perf_counter()
    for _ in range(count):
        decode_image(photo)
    return time.perf_counter() - start


def main() -> None:
    """Read by turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="reading-") as place:
        cache = build(Path(place) / "cache", given.images)
        size = sum(path.stat().st_size for path in (cache.root / "shards").iterdir())
        ways: dict[str, Callable[[], float]] = {
            "raw reads of the shard files": lambda: raw(cache),
            "loader, 2 workers": lambda: loaded(cache, given.images, 2),
            "loader, no workers": lambda: loaded(cache, given.images, 0),
            "decoding the images alone, one process": lambda: decoded(cache, given.images),
        }
        times = {name: list[float]() for name in ways}
        for _ in range(given.repeats):  # in turn, so that the machine's moods fall on all
            for name, way in ways.items():
                times[name].append(way())
    seconds = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(seconds.values()))
    rows = [
        [name, f"{given.images / s:,.0f}", f"{size / s / 1e6:,.0f}", f"{first / s:.3f}"] for name, s in seconds.items()
    ]
    print(f"{given.images} samples of {size / given.images / 1e6:.1f} MB")
    print(markdown([["", "samples/s", "MB/s", "ratio"], *rows]))


if __name__ == "__main__":
    main()
