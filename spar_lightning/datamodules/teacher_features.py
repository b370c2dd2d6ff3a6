"""What a cache is made of: an image, augmented once, and the teacher's features of the very bytes that are stored.

Images are read by one thread and decoded, augmented and encoded by others while the teacher works on an
earlier one: a fast accelerator would otherwise wait half of the time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spar_lightning.datamodules.ahead import ahead
from spar_lightning.datamodules.augmentation import Augmentation, Record, SizeError
from spar_lightning.datamodules.feature_shard import CacheError, Entry, Rejected
from spar_lightning.datamodules.image import ImageError, decode_image, encode_image
from spar_lightning.datamodules.source import Source
from spar_lightning.datamodules.source_images import augmented

Dtype = Literal["float16", "float32"]


class _Ready(NamedTuple):
    """An image (3, H, W) uint8 that waits for the teacher, with the bytes that it was decoded from."""

    source: Source
    content: bytes
    image: Tensor
    record: Record


class TeacherFeatures:
    """Turns source images into samples of the cache.

    Args:
        build_teacher: Makes the teacher, on its device, when the first image needs it.
        normalize: Pixels (1, 3, H, W) uint8 to what the teacher takes.
        augmentation: Applied to each image.
        seed: Of the augmentation.
        dtype: Precision in which features are stored.
        device: Of the teacher.
        precision: Context in which the teacher runs.
        threads: That decode and encode images beside the teacher.
    """

    def __init__(
        self,
        build_teacher: Callable[[], Any],
        normalize: Callable[[Tensor], Tensor],
        augmentation: Augmentation,
        seed: int,
        dtype: Dtype,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[Any]],
        threads: int = 1,
    ) -> None:
        self._build = build_teacher
        self._teacher: Any = None
        self.normalize, self.precision = normalize, precision
        self.augmentation, self.seed = augmentation, seed
        self.dtype, self.device = dtype, device
        self.threads = threads

    @property
    def teacher(self) -> Any:
        """The teacher, made at the first use."""
        if self._teacher is None:
            self._teacher = self._build()
        return self._teacher

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
            features = stored(self.features(ready.image), self.dtype, ready.source.key)
            yield Entry(ready.source.key, ready.source.digest, ready.content, features, ready.record)

    def _prepare(self, item: tuple[Source, bytes]) -> _Ready | Rejected:
        source, content = item
        try:
            image, record = augmented(source.key, content, self.augmentation, self.seed)
        except (ImageError, SizeError) as error:
            return Rejected(source.key, source.digest, str(error))
        kept = encode_image(image)
        return _Ready(source, kept, decode_image(kept), record)

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """The teacher's features (h, w, d) of an image (3, H, W) uint8."""
        with self.precision():
            features: Tensor = self.teacher(self.normalize(image.to(self.device)[None]))[0]
        return features


def stored(features: Tensor, dtype: Dtype, key: str) -> NDArray[Any]:
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
