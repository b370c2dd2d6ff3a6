"""The tokens that enter the first trainable block, kept on disk: what a student's frozen part gives never changes.

A product of a feature cache in a folder of its own beside `shards/`, made from the cached images and kept in
the same way (`feature_cache`), with the cache's fingerprint and the number of frozen blocks as its identity.
Training from it reads no image: a sample is the tokens and the teacher's features.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spar_lightning.datasets.augmentation import Augmentation, Record
from spar_lightning.datasets.image_source import Source
from spar_lightning.datasets.image_table import Images, find
from spar_lightning.datasets.samples import ActivationSample
from spar_lightning.feature_cache.cache import FeatureCache
from spar_lightning.feature_cache.cost import cost
from spar_lightning.feature_cache.dataset import CachedFeatures
from spar_lightning.feature_cache.extract import Dtype, Teacher, ahead, as_stored
from spar_lightning.feature_cache.shard import CacheError, Entry
from spar_lightning.formatting import bytes_text
from spar_lightning.sliding_window import SlidingWindow

ALGORITHM = 1  # raised by hand when the same weights and images give other tokens


class ActivationCache:
    """Cached activations of the samples of a feature cache.

    Args:
        cache: Whose images they are.
        teacher: The module whose student is trained.
        dtype: Precision in which tokens are stored.
        device: Of the student.
        precision: Context in which the student runs.

    Raises:
        UserError: The embedding of images trains, so nothing is frozen.
        CacheError: The folder holds tokens of another cache.
    """

    def __init__(
        self,
        cache: FeatureCache,
        teacher: Teacher,
        dtype: Dtype,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.blocks = teacher.frozen_blocks
        self._teacher = teacher
        self._make = partial(Activations, build_network=self._network, dtype=dtype, device=device, precision=precision)
        self._device, self._itemsize = device, np.dtype(dtype).itemsize
        identity = {"features": cache.fingerprint, "blocks": self.blocks, "algorithm": ALGORITHM}
        self.tokens = FeatureCache(folder_of(cache.root, self.blocks), identity, {"torch": torch.__version__})

    def bytes(self, images: Images, augmentation: Augmentation, seed: int) -> float:
        """Disk that the tokens of these images take; of a long list estimated from a sample."""
        student = self._teacher.student
        price = cost(images, augmentation, seed, SlidingWindow(student), student.embed_dim, self._itemsize)
        patch = student.patch_size
        with torch.no_grad():
            shape = student.embed(torch.zeros(1, 3, patch, patch).to(next(student.parameters()))).shape
        extra, width = shape[1] - 1, shape[2]  # of the sequence: prefix tokens of each image; D
        return float((price.patches + extra * price.images) * width * self._itemsize)

    def text(self, todo: Images, augmentation: Augmentation, seed: int) -> str:
        """What is to be made, in a line.

        Raises:
            CacheError: The disk does not hold it.
        """
        size, free = self.bytes(todo, augmentation, seed), shutil.disk_usage(self.tokens.root).free
        if size > free:
            raise CacheError(
                f"The tokens of the frozen blocks take {bytes_text(size)}, but {self.tokens.root} has "
                f"{bytes_text(free)} free. Make room, or set data.cache_activations: false."
            )
        return (
            f"{self.tokens.root}: tokens behind {self.blocks} frozen blocks, {len(todo):,} images to do, "
            f"{bytes_text(size)}; {bytes_text(free)} free"
        )

    def build(self, images: Images, features: CachedFeatures, show: bool) -> None:
        """Make what is missing, together with all other processes that call this."""
        self.tokens.build(images, self._make(features), show, "activations")

    def dataset(self, features: CachedFeatures) -> "CachedActivations":
        """The same samples, with tokens in the place of images."""
        return CachedActivations(self.tokens.dataset(features.keys), features)

    def _network(self) -> Callable[[Tensor], Tensor]:
        return self._teacher.build_activations(self._device)


def folder_of(root: Path, blocks: int) -> Path:
    """Return the folder of the tokens behind so many blocks; caches of version 0.1 call it prefix-N."""
    older = root / f"prefix-{blocks}"
    return older if older.exists() else root / f"activations-{blocks}"


def folders(root: Path) -> list[Path]:
    """Return all folders of a cache that hold tokens of frozen blocks."""
    manifests = [*root.glob("activations-*/manifest.json"), *root.glob("prefix-*/manifest.json")]
    return sorted(path.parent for path in manifests)


class Activations:
    """Turns an image of the cache into the tokens behind the frozen blocks.

    Args:
        samples: The cached images.
        build_network: Makes the frozen part, on its device, when the first image needs it: pixels (1, 3, H, W) uint8
            to tokens (1, prefix+N, D).
        dtype: Precision in which tokens are stored.
        device: Of the network.
        precision: Context in which the network runs.
    """

    def __init__(
        self,
        samples: CachedFeatures,
        build_network: Callable[[], Callable[[Tensor], Tensor]],
        dtype: Dtype,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._samples = samples
        self._order = np.argsort(samples.keys)
        self._keys = samples.keys[self._order]
        self._build = build_network
        self._network: Callable[[Tensor], Tensor] | None = None
        self.dtype, self.device, self.precision = dtype, device, precision

    def __call__(self, sources: Iterable[Source]) -> Iterator[Entry]:
        """The tokens of each image, in the place of features: (1, prefix+N, D).

        Raises:
            CacheError: They do not fit into the stored precision, or a shard is damaged.
        """
        if self._network is None:
            self._network = self._build()
        for source, image, record in ahead(self._read, sources, 1):
            with torch.no_grad(), self.precision():
                tokens = self._network(image.to(self.device)[None])
            yield Entry(source.key, source.digest, b"", as_stored(tokens, self.dtype, source.key), record)

    def _read(self, source: Source) -> tuple[Source, Tensor, Record]:
        place = find(self._keys, np.array([source.key.encode()]))
        shard, row = self._samples.locate(int(self._order[int(place[0])]))
        return source, shard.read(row)[0], shard.record(row)


class CachedActivations(Dataset[ActivationSample]):
    """Tokens and features by index; no image is read.

    Args:
        tokens: Of cached activations.
        features: The teacher's, of the same images in the same order.
    """

    def __init__(self, tokens: CachedFeatures, features: CachedFeatures) -> None:
        assert np.array_equal(tokens.keys, features.keys)
        self.tokens, self.features = tokens, features
        self.keys = features.keys

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> ActivationSample:
        shard, row = self.tokens.locate(index)
        _, tokens = shard.check(row)  # (1, prefix+N, D)
        shard, row = self.features.locate(index)
        return ActivationSample(shard.keys[row], tokens[0], shard.features(row))
