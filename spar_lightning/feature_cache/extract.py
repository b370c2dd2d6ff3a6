"""Computation of the samples of a feature cache: an augmented image and the teacher's features of it.

One thread reads images. Other threads decode, augment and encode them while the teacher processes an earlier image.
Without these threads, a fast accelerator is idle half of the time.
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
from spar_lightning.feature_cache.int8 import MOST_ERROR, quantized, relative_error
from spar_lightning.feature_cache.shard import CacheError, Entry, Rejected
from spar_lightning.image.codec import ImageError, decode_image, encode_image, encode_jpeg
from spar_lightning.sliding_window import SlidingWindow

Dtype = Literal["float16", "float32", "int8"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield the results of a function in the order of the items, computing up to `threads` results in advance.

    Args:
        function: Function to call in the threads. An exception is raised when its result is requested.
        items: Items, read one by one in the thread that requests the results.
        threads: Number of threads; with 1, the calls run one after another.
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
    """Interface between the feature cache and the training module; `Distillation` implements it.

    Attributes:
        student: Network that is trained, with the normalization, patch size and widths of the teacher.
        compiled: Whether the teacher is compiled.
    """

    student: Backbone
    compiled: bool

    @property
    @abstractmethod
    def frozen_blocks(self) -> int:
        """Number of frozen blocks at the start of the network."""

    @abstractmethod
    def teacher_identity(self) -> dict[str, Any]:
        """Return the settings that the teacher's features depend on: weights, windows and how windows are combined."""

    @abstractmethod
    def build_teacher(self) -> SlidingWindow:
        """Return a frozen copy of the network before training as a sliding-window teacher, on the module's device."""

    @abstractmethod
    def build_activations(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return a copy of the frozen blocks, which maps pixels (1, 3, H, W) uint8 to tokens (1, T, D)."""


class _Ready(NamedTuple):
    """Encoded image for the cache, and exactly these pixels (3, H, W) uint8, ready for the teacher."""

    source: Source
    content: bytes
    image: Tensor
    record: Record


class TeacherFeatures:
    """Function that computes samples of the cache from source images.

    Args:
        teacher: Training module that builds the teacher; called for the first image.
        augmentation: Augmentation of each image.
        seed: Seed of the augmentation.
        dtype: Precision of the stored features.
        device: Device of the teacher.
        precision: Function that returns the precision context in which the teacher runs.
        threads: Number of threads that decode and encode images while the teacher runs.
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
        """Sliding-window teacher, built on first use."""
        return self._module.build_teacher().to(self.device)

    def __call__(self, sources: Iterable[Source]) -> Iterator[Entry | Rejected]:
        """Yield the sample of each image, or the reason why the image cannot be used.

        Raises:
            ShardError: The bytes of an image changed after its shard was indexed.
            CacheError: A feature is outside the range of the stored precision.
        """
        read = ahead(lambda source: (source, source.read()), sources, 1)  # one thread, because streams are sequential
        for ready in ahead(self._prepare, read, self.threads):
            if isinstance(ready, Rejected):
                yield ready
                continue
            key, features = ready.source.key, self.features(ready.image)
            values, ranges = stored(features, self.dtype, key)
            yield Entry(key, ready.source.digest, ready.content, values, ready.record, ranges)

    def _prepare(self, item: tuple[Source, bytes]) -> _Ready | Rejected:
        source, content = item
        try:
            image, record = augmented(source.key, content, self.augmentation, self.seed)
        except (ImageError, SizeError) as error:
            return Rejected(source.key, source.digest, str(error))
        return _Ready(source, *encoded(image, self.dtype), record)

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """Compute the teacher's features (h, w, d) of an image (3, H, W) uint8."""
        with self.precision():
            features: Tensor = self.teacher(self._module.student.normalize(image.to(self.device)[None]))[0]
        return features


def encoded(image: Tensor, dtype: Dtype) -> tuple[bytes, Tensor]:
    """Encode an image (3, H, W) uint8 for the cache: without loss, or as JPEG next to int8 features.

    Returns:
        The encoded image and the pixels to which it decodes, which teacher and student get.
    """
    if dtype != "int8":
        return encode_image(image), image
    content = encode_jpeg(image)  # next to int8 features, lossless images would be a third of the cache
    return content, decode_image(content)


def stored(features: Tensor, dtype: Dtype, key: str) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Convert features (h, w, d) to the values that a shard stores; for int8, also return the ranges (2, d).

    Raises:
        CacheError: A value is not finite in this precision, or the error of int8 is above `MOST_ERROR`.
    """
    kept = as_stored(features, "float16" if dtype == "int8" else dtype, key)
    if dtype != "int8":
        return kept, None
    codes, ranges = quantized(features)
    error = relative_error(features, codes, ranges)
    if error > MOST_ERROR:
        raise CacheError(
            f"The features of {key} as int8 have an error of {error:.1%}, above {MOST_ERROR:.0%}, because some values "
            "of a channel are far from the others. Use float16 (data.cache_dtype, or --dtype of spar index)."
        )
    return codes, ranges


def as_stored(features: Tensor, dtype: Literal["float16", "float32"], key: str) -> NDArray[Any]:
    """Convert features to a floating-point type.

    Raises:
        CacheError: A value is not finite in this precision.
    """
    kept = features.to(getattr(torch, dtype))
    if not kept.isfinite().all():
        raise CacheError(
            f"The features of {key} exceed the range of {dtype} (largest value: {features.abs().max():.3g}). "
            "Use float32 (data.cache_dtype, or --dtype of spar index). If they are NaN or inf, check the weights and "
            "trainer.precision."
        )
    array: NDArray[np.floating[Any]] = kept.cpu().numpy()
    return array
