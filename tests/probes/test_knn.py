"""Tests of kNN segmentation on images whose patches are known."""

import pytest
import torch

from spar_lightning.backbones import Tiny
from spar_lightning.datasets.samples import IGNORED, LabelledImage
from spar_lightning.errors import UserError
from spar_lightning.probes.encoder import PatchEncoder
from spar_lightning.probes.knn import KNN, KNNSegmenter, fill
from spar_lightning.probes.memory_bank import MemoryBank
from spar_lightning.segmentation.config import InferenceConfig


def encoder() -> PatchEncoder:
    return PatchEncoder(Tiny(), InferenceConfig())


def images(count: int) -> list[LabelledImage]:
    """Return images of 64 x 64 pixels of noise with labels 0 and 1; the lower right quarter is unlabeled."""
    labels = torch.zeros(64, 64, dtype=torch.int16)
    labels[:, 32:] = 1
    labels[32:, 32:] = IGNORED
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return [LabelledImage(str(i), image, labels) for i, image in enumerate(pixels)]


def test_training_images_are_segmented_like_their_labels() -> None:
    """The nearest patch of a training image is itself; 48 of 64 patches of an image are labeled."""
    network, (image, *_) = encoder(), images(1)
    bank = MemoryBank(64, network.width, 2)
    assert list(fill(bank, network, [image], None, torch.Generator())) == [48] and bank.patches == 48
    predicted = KNNSegmenter(network, bank, KNN(k=1))(image.image)
    inner = torch.ones(64, 64, dtype=torch.bool)
    inner[:, 28:36] = False  # there the scores are interpolated
    counted = (image.labels != IGNORED) & inner
    assert predicted.shape == (64, 64) and torch.equal(predicted[counted], image.labels[counted].long())


def test_each_image_gives_the_same_number_of_patches() -> None:
    network = encoder()
    bank = MemoryBank(30, network.width, 2)
    assert list(fill(bank, network, images(3), 10, torch.Generator())) == [10, 10, 10]


def test_too_few_patches() -> None:
    network = encoder()
    bank = MemoryBank(10, network.width, 2)
    list(fill(bank, network, images(1), 10, torch.Generator()))
    with pytest.raises(UserError, match="10 patches with labels, fewer than --k 30"):
        KNNSegmenter(network, bank, KNN())
    with pytest.raises(UserError, match="--temperature must be above 0"):
        KNN(temperature=0)
    with pytest.raises(UserError, match="--k must be at least 1"):
        KNN(k=0)
