"""What a cache is made of: an image, augmented once, and the teacher's features of the very bytes that are stored."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spar_lightning.datamodules.augmentation import Augmentation, SizeError
from spar_lightning.datamodules.feature_shard import CacheError, Entry, Rejected
from spar_lightning.datamodules.image import ImageError, decode_image, encode_image
from spar_lightning.datamodules.source import Source
from spar_lightning.datamodules.source_images import augmented

Dtype = Literal["float16", "float32"]


class TeacherFeatures:
    """Turns a source image into a sample of the cache.

    Args:
        build_teacher: Makes the teacher, on its device, when the first image needs it.
        normalize: Pixels (1, 3, H, W) uint8 to what the teacher takes.
        augmentation: Applied to each image.
        seed: Of the augmentation.
        dtype: Precision in which features are stored.
        device: Of the teacher.
        precision: Context in which the teacher runs.
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
    ) -> None:
        self._build = build_teacher
        self._teacher: Any = None
        self.normalize, self.precision = normalize, precision
        self.augmentation, self.seed = augmentation, seed
        self.dtype, self.device = dtype, device

    @property
    def teacher(self) -> Any:
        """The teacher, made at the first use."""
        if self._teacher is None:
            self._teacher = self._build()
        return self._teacher

    def __call__(self, source: Source) -> Entry | Rejected:
        """The sample of one image, or why it cannot be used.

        Raises:
            ShardError: The bytes are not those that were scanned.
            CacheError: The features do not fit into the stored precision.
        """
        try:
            image, record = augmented(source, self.augmentation, self.seed)
        except (ImageError, SizeError) as error:
            return Rejected(source.key, source.digest, str(error))
        content = encode_image(image)
        features = self.features(decode_image(content))
        stored = features.cpu().numpy().astype(self.dtype)
        if not np.isfinite(stored).all():
            raise CacheError(
                f"The features of {source.key} do not fit into {self.dtype} (largest {features.abs().max():.3g}). "
                "Set data.cache_dtype: float32, or check the weights and trainer.precision if they are not finite."
            )
        return Entry(source.key, source.digest, content, stored, record)

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """The teacher's features (h, w, d) of an image (3, H, W) uint8."""
        with self.precision():
            features: Tensor = self.teacher(self.normalize(image.to(self.device)[None]))[0]
        return features
