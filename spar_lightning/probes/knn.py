"""k-nearest-neighbor segmentation: a patch gets the classes of the most similar training patches (Table 7).

The method is Hummingbird's (Balazevic et al., 2023): a soft label per training patch, softmax-weighted labels of the
neighbors, bilinear interpolation to pixels, argmax. Images keep their native size, as in the paper.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spar_lightning.datasets.samples import LabelledImage
from spar_lightning.errors import UserError, check_at_least
from spar_lightning.probes.encoder import PatchEncoder
from spar_lightning.probes.memory_bank import MemoryBank, balanced, class_counts
from spar_lightning.segmentation.label_map import StoredMaps, Thresholds, label_map


@dataclass(frozen=True)
class KNN:
    """Settings of k-nearest-neighbor segmentation.

    Attributes:
        k: Number of neighbors.
        temperature: Divisor of the cosine similarities in the softmax over neighbors.

    Raises:
        UserError: If a value is not positive.
    """

    k: int = 30
    temperature: float = 0.02

    def __post_init__(self) -> None:
        check_at_least(1, **{"--k": self.k})
        if not self.temperature > 0:
            raise UserError(f"--temperature must be above 0, but got {self.temperature}.")


class KNNSegmenter:
    """Segmentation of images by the labels of the nearest training patches.

    Args:
        encoder: Encoder of the patches.
        bank: Training patches.
        settings: Number of neighbors and temperature.

    Raises:
        UserError: If the bank has fewer patches than neighbors are needed.
    """

    def __init__(self, encoder: PatchEncoder, bank: MemoryBank, settings: KNN) -> None:
        if bank.patches < settings.k:
            raise UserError(
                f"The training images have {bank.patches} patches with labels, fewer than --k {settings.k}. Use more "
                "images, or a smaller --k."
            )
        self._encoder, self._bank, self._settings = encoder, bank, settings

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Return the segmentation map (H, W) of an image (3, H, W) uint8 on the network's device."""
        features = self._encoder(image)  # (h, w, D)
        shares = self._bank.label(features.flatten(0, 1), self._settings.k, self._settings.temperature)
        maps = StoredMaps(shares.T.unflatten(1, features.shape[:2]))  # (C, h, w)
        classes = torch.arange(shares.shape[1], device=shares.device)
        return label_map(maps, classes, (image.shape[-2], image.shape[-1]), Thresholds())


def fill(
    bank: MemoryBank,
    encoder: PatchEncoder,
    images: Iterable[LabelledImage],
    per_image: int | None,
    generator: torch.Generator,
) -> Iterator[int]:
    """Add the patches of training images to a bank, one image per step; yield the number of added patches.

    Patches without a labeled pixel are left out.

    Args:
        bank: Bank with space for all patches.
        encoder: Encoder of the patches.
        images: Training images.
        per_image: Number of patches of each image, sampled by `balanced`; None adds all.
        generator: Random generator on the CPU.
    """
    device, patch = next(encoder.backbone.parameters()).device, encoder.backbone.patch_size
    for image in images:
        features = encoder(image.image.to(device))
        counts = class_counts(image.labels, (features.shape[0], features.shape[1]), patch, bank.classes)
        labeled = counts.sum(1).nonzero()[:, 0]
        if per_image is not None:
            labeled = labeled[balanced(counts[labeled], per_image, generator)]
        bank.add(features.flatten(0, 1)[labeled.to(device)], counts[labeled])
        yield len(labeled)
