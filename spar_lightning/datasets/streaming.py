"""Augmented images read directly from the shards, for training without a cache and for building one."""

from torch import Tensor
from torch.utils.data import Dataset

from spar_lightning.datasets.augmentation import Augmentation, Record, SizeError
from spar_lightning.datasets.image_table import Images
from spar_lightning.datasets.samples import Sample
from spar_lightning.datasets.shard_error import ShardError
from spar_lightning.image.codec import ImageError, decode_image


def augmented(key: str, content: bytes, augmentation: Augmentation, seed: int) -> tuple[Tensor, Record]:
    """Decode and augment an image.

    Args:
        key: Key of the image; determines the random draw.
        content: Bytes of the image file.
        augmentation: Augmentation to apply.
        seed: Seed of the augmentation.

    Returns:
        The augmented image (3, H, W) uint8, and the augmentation that was drawn.

    Raises:
        ImageError: If the bytes cannot be decoded as an image.
        SizeError: If the image is too small or has an extreme aspect ratio.
    """
    image = decode_image(content)
    record = augmentation.draw(image.shape[-2], image.shape[-1], seed, key)
    return augmentation.apply(image, record), record


class SourceImages(Dataset[Sample]):
    """Dataset of augmented images without features.

    Args:
        images: Table of the images.
        augmentation: Augmentation to apply; the result for an image is the same in every epoch.
        seed: Seed of the augmentation.
    """

    def __init__(self, images: Images, augmentation: Augmentation, seed: int) -> None:
        self.images, self.augmentation, self.seed = images, augmentation, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        source = self.images[index]
        try:
            image, _ = augmented(source.key, source.read(), self.augmentation, self.seed)
        except (ImageError, SizeError) as error:
            raise ShardError(
                f"{source.location}: {source.key} cannot be used ({error}). Exclude it with data.keys, or train from "
                "a cache (data.cache), which skips and counts such images."
            ) from error
        return Sample(source.key, image, None)
