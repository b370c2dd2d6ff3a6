"""`spar speed read`: loading samples of a cache, compared with raw reads of the same bytes.

Samples have the size of the released configuration with a ViT-B/16: 1152 x 768 pixels and 3456 x 768 features in
float16, or in int8. All files are in the page cache. The measurement therefore covers HDF5, checksums, decoding and
the transfer between processes, but not the disk. The image is noise with the spectrum of a photograph, so it compresses
like one.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import Dataset

from spar_lightning.datamodules.dataloader import ResumableLoader
from spar_lightning.datamodules.samplers import EpochOrder
from spar_lightning.datasets.augmentation import Record
from spar_lightning.datasets.image_source import Source
from spar_lightning.datasets.image_table import Images
from spar_lightning.feature_cache.activations import CachedActivations
from spar_lightning.feature_cache.cache import FeatureCache
from spar_lightning.feature_cache.int8 import quantized
from spar_lightning.feature_cache.shard import Entry
from spar_lightning.image.codec import decode_image, encode_image, encode_jpeg
from spar_lightning.speed.bench import Bench
from spar_lightning.speed.comparison import Comparison, Way

HEIGHT, WIDTH, PATCH, CHANNELS = 768, 1152, 16, 768
GRID = (HEIGHT // PATCH, WIDTH // PATCH)
PER_SHARD: Final = 4  # gives more shards than a process keeps open, as in a real cache
KEYS = np.array([f"sa_{i}".encode() for i in range(96)])


def read(bench: Bench) -> Iterator[Comparison]:
    """Compare raw reads, the loader with images and with cached activations, and decoding alone."""
    with tempfile.TemporaryDirectory(prefix="spar-read-") as place:
        picture, jpeg = encode_image(photograph()), encode_jpeg(photograph())
        caches = {
            "features": _build(Path(place) / "features", picture, GRID),
            "int8": _build(Path(place) / "int8", jpeg, GRID, eight_bits=True),
            "tokens": _build(Path(place) / "tokens", b"", (1, GRID[0] * GRID[1])),
        }
        features, small, tokens = (cache.dataset(KEYS) for cache in caches.values())
        activations = CachedActivations(tokens, features)
        loaders = {
            "loader, 2 workers": _epochs(features, 2),
            "loader, 2 workers, int8": _epochs(small, 2),
            "loader, 2 workers, cached activations": _epochs(activations, 2),
            "loader, no workers": _epochs(features, 0),
        }
        ways = {
            "raw reads of the feature shards": Way(lambda: _raw(caches["features"])),
            **{name: Way(run) for name, run in loaders.items()},
            "decoding the images, one process": Way(lambda: [decode_image(picture) for _ in KEYS]),
            "decoding the images, one process, int8": Way(lambda: [decode_image(jpeg) for _ in KEYS]),
        }
        size = sum(path.stat().st_size for path in (caches["features"].root / "shards").iterdir()) / len(KEYS)
        title = f"reading samples of {size / 1e6:.1f} MB"
        yield Comparison(title, "samples", len(KEYS), ways).measure(bench.repeats, torch.device("cpu"))


def photograph() -> torch.Tensor:
    """Return an image (3, H, W), uint8, of noise whose spectrum falls with 1 / frequency, as in photographs."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf
    noise = rng.standard_normal((3, HEIGHT, WIDTH))
    smooth = np.fft.irfft2(np.fft.rfft2(noise) / frequency, (HEIGHT, WIDTH))
    pixels = 128 + 40 * smooth / smooth.std() + rng.standard_normal((3, HEIGHT, WIDTH))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


def _build(root: Path, content: bytes, grid: tuple[int, int], eight_bits: bool = False) -> FeatureCache:
    """Build a cache in which all samples have the same image and random features."""
    rng = np.random.default_rng(0)

    def make(sources: Iterable[Source]) -> Iterator[Entry]:
        for source in sources:
            features = rng.standard_normal((*grid, CHANNELS), np.float32)
            codes, ranges = quantized(torch.from_numpy(features)) if eight_bits else (features.astype(np.float16), None)
            record = Record(HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH, False)
            yield Entry(source.key, source.digest, content, codes, record, ranges)

    cache = FeatureCache(root, {"teacher": "random"})
    for keys in np.split(KEYS, range(PER_SHARD, len(KEYS), PER_SHARD)):
        sources = [Source(key.decode(), "photo.tar", key.decode(), 0, 0, f"{int(key[3:]):032x}") for key in keys]
        cache.build(Images.collect(sources, [(HEIGHT, WIDTH)] * len(sources)), make, show=False)
    return cache


def _epochs(dataset: Dataset[Any], workers: int) -> Callable[[], None]:
    """Return a function that runs one epoch through a loader with persistent workers."""
    order = EpochOrder(len(KEYS), 1, 0, 1, seed=0)
    loader = ResumableLoader(dataset, order, workers)

    def epoch() -> None:
        for _ in loader:
            pass
        order.set_epoch(order.epoch + 1)

    return epoch


def _raw(cache: FeatureCache) -> None:
    for path in sorted((cache.root / "shards").iterdir()):
        path.read_bytes()
