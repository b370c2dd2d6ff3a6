"""Samples of a cache: an image, augmented once, and the teacher's features of the pixels that are stored.

Images are read by one thread and decoded, augmented and encoded by others while the teacher works on an
earlier one: a fast accelerator would otherwise wait half of the time.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spar_lightning.backbones.base import Backbone
from spar_lightning.datasets.augmentation import Augmentation, Record, SizeError
from spar_lightning.datasets.image_source import Source
from spar_lightning.datasets.streaming import augmented
from spar_lightning.feature_cache.shard import CacheError, Entry, Rejected
from spar_lightning.image.codec import ImageError, encode_image
from spar_lightning.sliding_window import SlidingWindow

Dtype = Literal["float16", "float32"]


Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Results of a function in the order of the items; as many as there are threads are computed in advance.

    Args:
        function: Called in the threads; what it raises comes up in the place of its result.
        items: Taken one by one, in the thread that asks for the results.
        threads: With one, the calls follow each other.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Teacher(ABC):
    """Interface of the feature cache to the module that trains; `Distillation` implements it.

    Attributes:
        student: The network that is trained; normalization, patch size and widths are those of the teacher.
        compiled: Whether the teacher runs compiled.
    """

    student: Backbone
    compiled: bool

    @property
    @abstractmethod
    def frozen_blocks(self) -> int:
        """Number of first blocks that training does not change."""

    @abstractmethod
    def teacher_identity(self) -> dict[str, Any]:
        """Return what the teacher's features depend on: weights, windows and how they are combined."""

    @abstractmethod
    def build_teacher(self) -> SlidingWindow:
        """Return a frozen copy of the network as it was before training, in sliding windows, on the module's device."""

    @abstractmethod
    def build_activations(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return a copy of the frozen blocks: pixels (1, 3, H, W) uint8 to tokens (1, prefix+N, D)."""


class _Ready(NamedTuple):
    """An image (3, H, W) uint8 that waits for the teacher, with its lossless encoding."""

    source: Source
    content: bytes
    image: Tensor
    record: Record


class TeacherFeatures:
    """Turns source images into samples of the cache.

    Args:
        teacher: Its network is built, on the device, when the first image needs it.
        augmentation: Applied to each image.
        seed: Seed of the augmentation.
        dtype: Precision in which features are stored.
        device: Device of the teacher.
        precision: Context in which the teacher runs.
        threads: Threads that decode and encode images while the teacher runs.
    """

    def __init__(
        self,
        teacher: Teacher,
        augmentation: Augmentation,
        seed: int,
        dtype: Dtype,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[Any]],
        threads: int = 1,
    ) -> None:
        self._module = teacher
        self.precision = precision
        self.augmentation, self.seed = augmentation, seed
        self.dtype, self.device = dtype, device
        self.threads = threads

    @cached_property
    def teacher(self) -> SlidingWindow:
        """The teacher's network in sliding windows, built at the first use."""
        return self._module.build_teacher().to(self.device)

    def __call__(self, sources: Iterable[Source]) -> Iterator[Entry | Rejected]:
        """The sample of each image, or why it cannot be used.

        Raises:
            ShardError: The bytes are not those that were scanned.
            CacheError: The features do not fit into the stored precision.
        """
        read = ahead(lambda source: (source, source.read()), sources, 1)  # a stream is read by one, in order
        for ready in ahead(self._prepare, read, self.threads):
            if isinstance(ready, Rejected):
                yield ready
                continue
            features = as_stored(self.features(ready.image), self.dtype, ready.source.key)
            yield Entry(ready.source.key, ready.source.digest, ready.content, features, ready.record)

    def _prepare(self, item: tuple[Source, bytes]) -> _Ready | Rejected:
        source, content = item
        try:
            image, record = augmented(source.key, content, self.augmentation, self.seed)
        except (ImageError, SizeError) as error:
            return Rejected(source.key, source.digest, str(error))
        return _Ready(source, encode_image(image), image, record)  # lossless: what is decoded later is this image

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """The teacher's features (h, w, d) of an image (3, H, W) uint8."""
        with self.precision():
            features: Tensor = self.teacher(self._module.student.normalize(image.to(self.device)[None]))[0]
        return features


def as_stored(features: Tensor, dtype: Dtype, key: str) -> NDArray[Any]:
    """Features as they are kept on disk.

    Raises:
        CacheError: They do not fit into the precision.
    """
    kept = features.to(getattr(torch, dtype))
    if not kept.isfinite().all():
        raise CacheError(
            f"The features of {key} do not fit into {dtype} (largest {features.abs().max():.3g}). "
            "Set data.cache_dtype: float32, or check the weights and trainer.precision if they are not finite."
        )
    array: NDArray[np.floating[Any]] = kept.cpu().numpy()
    return array
