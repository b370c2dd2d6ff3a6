"""Cached activations: the tokens that enter the first trainable block, stored on disk.

The frozen blocks of a student always return the same tokens for an image, so they run once per image. The tokens are
computed from the images of a feature cache and stored next to its `shards/`, in a folder with the same format
(see `feature_cache.cache`). The cache key consists of the fingerprint of the feature cache, the number of frozen
blocks and the settings of windowed attention. Training from cached activations does not read images: a sample is the
tokens and the teacher's features.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
from spar_lightning.feature_cache.extract import Teacher, ahead, as_stored
from spar_lightning.feature_cache.shard import CacheError, Entry
from spar_lightning.files.hashing import hash_json
from spar_lightning.formatting import bytes_text
from spar_lightning.sliding_window import SlidingWindow

ALGORITHM = 1  # increase this when the same weights and images produce different tokens


class ActivationCache:
    """Cached activations of the samples of a feature cache.

    Args:
        cache: Feature cache that contains the images.
        teacher: Module that trains the student.
        dtype: Precision of the stored tokens.
        device: Device of the student.
        precision: Function that returns the precision context in which the student runs.

    Raises:
        UserError: The patch embedding is trained, so no blocks are frozen.
        CacheError: The folder contains tokens with a different cache key.
    """

    def __init__(
        self,
        cache: FeatureCache,
        teacher: Teacher,
        dtype: Literal["float16", "float32"],
        device: torch.device,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.blocks = teacher.frozen_blocks
        self._teacher = teacher
        self._make = partial(Activations, build_network=self._network, dtype=dtype, device=device, precision=precision)
        self._device, self._dtype = device, dtype
        identity = {"features": cache.fingerprint, "blocks": self.blocks, "algorithm": ALGORITHM}
        attention = teacher.student.attention_identity()
        if attention is not None:
            identity["attention"] = attention
        folder = folder_of(cache.root, self.blocks, attention)
        self.tokens = FeatureCache(folder, identity, {"torch": torch.__version__})

    def bytes(self, images: Images, augmentation: Augmentation, seed: int) -> float:
        """Return the size in bytes of the tokens of these images; for long lists, estimate it from a sample."""
        student = self._teacher.student
        price = cost(images, augmentation, seed, SlidingWindow(student), student.embed_dim, self._dtype)
        patch = student.patch_size
        with torch.no_grad():
            shape = student.embed(torch.zeros(1, 3, patch, patch).to(next(student.parameters()))).shape
        extra, width = shape[1] - 1, shape[2]  # class and register tokens per image; D
        return float((price.patches + extra * price.images) * width * np.dtype(self._dtype).itemsize)

    def text(self, todo: Images, size: float, features: float = 0.0) -> str:
        """Return one line that describes the remaining work and its size.

        Args:
            todo: Images without tokens.
            size: Size in bytes of their tokens.
            features: Size in bytes of the features that will be stored on the same disk.

        Raises:
            CacheError: The disk has too little free space for tokens and features together.
        """
        free = shutil.disk_usage(self.tokens.root).free
        if size + features > free:
            together = f" and the features {bytes_text(features)}" if features else ""
            raise CacheError(
                f"The tokens of the frozen blocks need {bytes_text(size)}{together}, but {self.tokens.root} has only "
                f"{bytes_text(free)} free. Free some disk space, or set data.cache_activations: false."
            )
        return (
            f"{self.tokens.root}: tokens after {self.blocks} frozen blocks, {len(todo):,} images to do, "
            f"{bytes_text(size)}; {bytes_text(free)} free"
        )

    def build(self, images: Images, features: CachedFeatures, show: bool) -> None:
        """Compute the missing tokens, together with all other processes that call this method."""
        self.tokens.build(images, self._make(features), show, "activations")

    def dataset(self, features: CachedFeatures) -> "CachedActivations":
        """Return a dataset of the same samples with tokens instead of images."""
        return CachedActivations(self.tokens.dataset(features.keys), features)

    def _network(self) -> Callable[[Tensor], Tensor]:
        return self._teacher.build_activations(self._device)


def folder_of(root: Path, blocks: int, attention: dict[str, Any] | None) -> Path:
    """Return the folder of the tokens after `blocks` frozen blocks, for full (None) or windowed attention.

    In caches of version 0.1, the folder is named prefix-N.
    """
    if attention is not None:
        return root / f"activations-{blocks}-windowed-{hash_json(attention, 8)}"
    older = root / f"prefix-{blocks}"
    return older if older.exists() else root / f"activations-{blocks}"


def folders(root: Path) -> list[Path]:
    """Return all folders of a feature cache that contain cached activations."""
    manifests = [*root.glob("activations-*/manifest.json"), *root.glob("prefix-*/manifest.json")]
    return sorted(path.parent for path in manifests)


class Activations:
    """Function that computes the tokens after the frozen blocks for cached images.

    Args:
        samples: Samples of the feature cache with the images.
        build_network: Function that returns the frozen blocks on `device`. The blocks map pixels (1, 3, H, W) uint8 to
            tokens (1, T, D), where T counts the class, register and patch tokens. Called for the first image.
        dtype: Precision of the stored tokens.
        device: Device of the network.
        precision: Function that returns the precision context in which the network runs.
    """

    def __init__(
        self,
        samples: CachedFeatures,
        build_network: Callable[[], Callable[[Tensor], Tensor]],
        dtype: Literal["float16", "float32"],
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
        """Yield an entry for each image, with tokens (1, T, D) instead of features.

        Raises:
            CacheError: A token is outside the range of the stored precision, or a shard is damaged.
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
    """Dataset of cached activations and teacher features; does not read images.

    Args:
        tokens: Cached activations.
        features: Teacher features of the same images in the same order.
    """

    def __init__(self, tokens: CachedFeatures, features: CachedFeatures) -> None:
        assert np.array_equal(tokens.keys, features.keys)
        self.tokens, self.features = tokens, features
        self.keys = features.keys

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> ActivationSample:
        shard, row = self.tokens.locate(index)
        _, tokens = shard.check(row)  # (1, T, D)
        shard, row = self.features.locate(index)
        return ActivationSample(shard.keys[row], tokens[0], shard.features(row))
