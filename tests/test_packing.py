"""A pack gives what its images give one by one, forward and backward."""

import pytest
import torch

from spar_lightning.backbones import Tiny
from spar_lightning.packing import dense_features

SIZES = [(64, 64), (40, 96), (72, 24)]


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=generator) for size in SIZES]


@pytest.mark.parametrize("packs", [True, False])
def test_a_pack_equals_its_images_one_by_one(packs: bool) -> None:
    tiny = Tiny()
    tiny.packs = packs
    together = dense_features(tiny, images())
    for image, features in zip(images(), together, strict=True):
        torch.testing.assert_close(features, tiny(image[None])[0], rtol=0, atol=2e-5)


def test_gradients_are_the_sum_over_images() -> None:
    packed, single = Tiny(), Tiny()
    torch.stack([features.square().mean() for features in dense_features(packed, images())]).sum().backward()
    for image in images():
        single(image[None]).square().mean().backward()
    for (name, p), q in zip(packed.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
