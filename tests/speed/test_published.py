"""Tests of the published procedure: it computes the same results as ours, so that ratios compare the same work."""

import copy

import pytest
import torch

from spar_lightning.backbones import Tiny
from spar_lightning.datasets.samples import Sample
from spar_lightning.distillation import Distillation
from spar_lightning.sliding_window import SlidingWindow
from spar_lightning.speed import published
from tests.rounding import assert_rounded


@pytest.mark.parametrize("stride", [8, 12, 16, 27, 64])
@pytest.mark.parametrize("size", [(64, 64), (80, 136), (40, 104), (152, 72)])
def test_stitched_features_are_the_same(stride: int, size: tuple[int, int]) -> None:
    tiny = Tiny()
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = SlidingWindow(tiny, stride)(image[None])[0]
    assert_rounded(published.teacher_features(tiny, image, stride), ours, tiny.depth, tiny.embed_dim)


def test_a_step_is_the_same() -> None:
    ours = Distillation(Tiny(), trainable=("blocks.-2", "blocks.-1"), lr=1e-3)
    training = published.Training(copy.deepcopy(ours.student), lr=1e-3, weight_decay=ours.weight_decay)
    optimizer = ours.configure_optimizers()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        image = torch.randint(0, 256, (3, 72, 96), dtype=torch.uint8, generator=generator)
        target = torch.randn(9, 12, 128, generator=generator)
        loss = ours.batch_loss([Sample("sa_1", image, target)])
        assert torch.equal(training.step(ours.student.normalize(image), target), loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for one, other in zip(ours.student.parameters(), training.backbone.parameters(), strict=True):
        assert torch.equal(one, other)
