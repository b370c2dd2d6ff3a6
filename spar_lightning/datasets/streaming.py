"""Augmented images straight from where they lie, for training without a cache and for building one."""

from torch import Tensor
from torch.utils.data import Dataset

from spar_lightning.datasets.augmentation import Augmentation, Record, SizeError
from spar_lightning.datasets.image_source import ShardError
from spar_lightning.datasets.image_table import Images
from spar_lightning.datasets.samples import Sample
from spar_lightning.image.codec import ImageError, decode_image


def augmented(key: str, content: bytes, augmentation: Augmentation, seed: int) -> tuple[Tensor, Record]:
    """The image as it is trained on (3, H, W) uint8, and what was done to it.

    Args:
        key: Of the image; decides what is drawn.
        content: Its bytes.
        augmentation: Applied to it.
        seed: Of the augmentation.

    Raises:
        ImageError: The bytes are no image.
        SizeError: The image is too small.
    """
    image = decode_image(content)
    record = augmentation.draw(image.shape[-2], image.shape[-1], seed, key)
    return augmentation.apply(image, record), record


class SourceImages(Dataset[Sample]):
    """Augmented images without features.

    Args:
        images: Where they lie.
        augmentation: Applied to each, the same in every epoch.
        seed: Of the augmentation.
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
                f"{source.location}: {source.key} cannot be used ({error}). Leave it out with data.keys, or train from "
                "a cache (data.cache), which sets such images aside and counts them."
            ) from error
        return Sample(source.key, image, None)
